"""A real two-node Slurm on this machine, for the tests: munged, slurmctld and two slurmd.

Both nodes are this host; each has its own port and pretends to have `CPUS` cores and as many GPUs
(empty files that Slurm counts), so nothing here needs systemd, cgroups or a configured site.
Only root can run it (slurmd starts tasks as users).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Callable, Dict, List, Optional

import psutil

from tests.waiting import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("node1", "node2")
CPUS = 4
KILL_WAIT = 8
"""Seconds from SIGTERM to SIGKILL: an upper limit, a job that ends earlier is not kept waiting."""
GRACE_TIME = 8

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={munge_socket},cred_expire=5
StateSaveLocation={state}
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
GresTypes=gpu
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=100000
ReturnToService=2
KillWait={kill_wait}
MinJobAge=300
SlurmdTimeout=15
TCPTimeout=5
InactiveLimit=0
OverTimeLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE \
GraceTime={grace_time} MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=ALL PriorityTier=1 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def why_not() -> Optional[str]:
    """The reason why no cluster can be started here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}): apt-get install slurmctld slurmd"
    if os.geteuid() != 0:
        return "only root can start slurmd"
    return None


def free_ports(count: int) -> List[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


class SlurmCluster:
    """Start it, then run Slurm's own commands with `run`; `stop` ends every daemon."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        self._daemons: Dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        host = socket.gethostname()
        controller_port, *ports = free_ports(1 + len(NODES))
        (self.root / "state").mkdir(parents=True)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} "
            f"RealMemory=2000 Gres=gpu:{CPUS} State=UNKNOWN"
            for name, port in zip(NODES, ports)
        )
        config = CONFIG.format(
            host=host,
            controller_port=controller_port,
            munge_socket=self.root / "munge.socket",
            state=self.root / "state",
            root=self.root,
            kill_wait=KILL_WAIT,
            grace_time=GRACE_TIME,
            nodes=nodes,
        )
        (self.root / "slurm.conf").write_text(config)
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-{CPUS - 1}]\n")
        for number in range(CPUS):
            (self.root / f"gpu{number}").touch()
        self._start_munge()
        self._spawn("slurmctld", "slurmctld", "-c", "-D")
        for name in NODES:
            self.start_node(name)
        self._wait_idle()

    def start_node(self, name: str) -> None:
        (self.root / f"spool-{name}").mkdir(exist_ok=True)
        self._spawn(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """SIGKILL to a node's daemon, as when the machine dies."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """Standard output of a Slurm command."""
        done = subprocess.run(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}")
        return done.stdout

    def state(self, job_id: str) -> str:
        """The job's state, e.g. RUNNING, PENDING, CANCELLED."""
        return self.field(job_id, "JobState")

    def field(self, job_id: str, name: str) -> str:
        """One field of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", "-o", job_id).split()
        return next(w.partition("=")[2] for w in words if w.startswith(name + "="))

    def stop(self) -> None:
        self.run("scancel", "--signal=KILL", "--user=root", check=False)
        for daemon in reversed(list(self._daemons.values())):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self._ours():  # slurmstepd waits for a controller that is gone
            process.kill()

    def rank_process(self, job_id: str, rank: int) -> psutil.Process:
        """The process of one rank of a running job."""
        wanted = {"SLURM_JOB_ID": job_id, "HOROVOD_RANK": str(rank)}
        return next(
            process
            for process in self._ours()
            if all(process.environ().get(name) == value for name, value in wanted.items())
        )

    def _ours(self) -> List[psutil.Process]:
        """All processes with this cluster's configuration in their environment.

        It is read raw: slurmstepd writes its title over the beginning, which misleads psutil.
        """
        wanted = f"SLURM_CONF={self.environment['SLURM_CONF']}\0".encode()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if wanted in Path(f"/proc/{process.pid}/environ").read_bytes():
                    found.append(process)
        return found

    def _start_munge(self) -> None:
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {
            "key-file": key,
            "socket": self.root / "munge.socket",
            "pid-file": self.root / "munged.pid",
            "log-file": self.root / "munged.log",
            "seed-file": self.root / "munged.seed",
        }
        options = [f"--{name}={path}" for name, path in files.items()]
        self._spawn("munged", "munged", "--force", "--foreground", *options)
        self._wait_for("munged", lambda: files["socket"].exists())

    def _spawn(self, name: str, *command: str) -> None:
        with open(self.root / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output
            )

    def _wait_idle(self) -> None:
        def idle() -> bool:
            states = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False).split()
            return states == ["idle"] * len(NODES)

        self._wait_for("two idle nodes", idle)

    def _wait_for(self, what: str, ready: Callable[[], bool]) -> None:
        def otherwise() -> str:
            logs = "\n".join(p.read_text()[-1000:] for p in sorted(self.root.glob("*.out")))
            return f"no {what}:\n{logs}"

        wait_until(ready, otherwise)

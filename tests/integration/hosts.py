"""Several hosts on this machine: network namespaces on a bridge, each with its own host name.

Each has the line `127.0.1.1 <its own name>` in /etc/hosts, as Debian's installer writes it, and a
second interface (`spare`) whose network leads nowhere.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence

ROOT = Path(__file__).resolve().parents[2]
INSIDE = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


def why_not() -> Optional[str]:
    """The reason why no hosts can be made here, or None."""
    missing = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install iproute2 util-linux"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    probe = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


def slurm_variables(number: int, count: int) -> Dict[str, str]:
    """What Slurm tells the task of host ``number`` (from 0) of ``count`` with a task each."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(number),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{count})",
        "SLURM_STEP_NODELIST": f"h[1-{count}]",
        "SLURM_CPUS_PER_TASK": "1",
    }


def start_ranks(
    hosts: Hosts,
    ranks_of_hosts: Sequence[int],
    command: Sequence[str],
    environment: Mapping[str, str],
) -> List[subprocess.Popen]:
    """Starts a rank of `command` for each that a host is to have, in rank order."""
    count = sum(ranks_of_hosts)
    shape = {
        **slurm_variables(0, count),
        "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, ranks_of_hosts)),
        "SLURM_STEP_NODELIST": f"h[1-{len(ranks_of_hosts)}]",
    }
    places = [(host, local) for host, n in enumerate(ranks_of_hosts) for local in range(n)]
    launched = [sys.executable, "-m", "launch", "slurm-rank", "--", *command]
    return [
        hosts.start(
            hosts.names[host],
            launched,
            {
                **shape,
                "SLURM_PROCID": str(rank),
                "SLURM_NODEID": str(host),
                "SLURM_LOCALID": str(local),
                **environment,
            },
        )
        for rank, (host, local) in enumerate(places)
    ]


def ip(*arguments: str, namespace: Optional[str] = None) -> None:
    """The `ip` command, in a namespace."""
    where = ["-n", namespace] if namespace else []
    subprocess.run(["ip", *where, *arguments], check=True, capture_output=True)


class Hosts:
    """`count` hosts h1, h2, ... at 10.77.0.1, 10.77.0.2, ... on one network."""

    def __init__(self, count: int, folder: Path) -> None:
        self.names = [f"h{i}" for i in range(1, count + 1)]
        self._prefix = f"t{os.getpid()}"
        self._switch = f"{self._prefix}switch"
        self._folder = folder
        self._processes: Dict[str, List[subprocess.Popen]] = {name: [] for name in self.names}

    def __enter__(self) -> Hosts:
        ip("netns", "add", self._switch)
        for number, name in enumerate(self.names, 1):
            self._make(number, name)
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            self.kill(name)
        for namespace in (*map(self._namespace, self.names), self._switch):
            subprocess.run(["ip", "netns", "del", namespace], check=False)

    def _namespace(self, name: str) -> str:
        return self._prefix + name

    def _make(self, number: int, name: str) -> None:
        namespace = self._namespace(name)
        ip("netns", "add", namespace)
        ip("link", "set", "lo", "up", namespace=namespace)
        self.add_interface(name, "eth0", f"10.77.0.{number}/24", bridge="bridge")
        ip("link", "add", "spare", "type", "veth", "peer", "nowhere", namespace=namespace)
        ip("addr", "add", f"10.78.{number}.1/24", "dev", "spare", namespace=namespace)
        for interface in ("spare", "nowhere"):
            ip("link", "set", interface, "up", namespace=namespace)
        others = [f"10.77.0.{n} {other}" for n, other in enumerate(self.names, 1) if other != name]
        self.know(name, others)

    def add_interface(self, name: str, interface: str, address: str, bridge: str) -> None:
        """Gives a host one more interface, on the network of that `bridge`."""
        namespace, port = self._namespace(name), name + interface.replace("eth0", "")
        if name == self.names[0]:
            ip("link", "add", bridge, "type", "bridge", namespace=self._switch)
            ip("link", "set", bridge, "up", namespace=self._switch)
        ip("link", "add", interface, "type", "veth", "peer", port, "netns", self._switch,
           namespace=namespace)  # fmt: skip
        ip("addr", "add", address, "dev", interface, namespace=namespace)
        ip("link", "set", interface, "up", namespace=namespace)
        ip("link", "set", port, "master", bridge, "up", namespace=self._switch)

    def know(self, name: str, others: Sequence[str]) -> None:
        """Writes a host's /etc/hosts."""
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}", *others]
        (self._folder / f"hosts-{name}").write_text("\n".join(lines) + "\n")

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen:
        """Runs `command` on a host, from the project's folder; both streams in one pipe."""
        process = subprocess.Popen(
            [
                "nsenter", f"--net=/run/netns/{self._namespace(name)}",
                "unshare", "--mount", "--uts", "sh", "-c", INSIDE, "sh",
                str(self._folder / f"hosts-{name}"), name, *command,
            ],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )  # fmt: skip
        self._processes[name].append(process)
        return process

    def throttle(self, rate: str) -> None:
        """Limits what each host sends, to e.g. ``1gbit``, with bursts of up to a megabyte."""
        for name in self.names:
            qdisc = ["qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate]
            subprocess.run(
                ["tc", "-n", self._namespace(name), *qdisc, "burst", "1mb", "latency", "100ms"],
                check=True,
            )

    def cut(self, name: str) -> None:
        """Pulls the host's cable."""
        ip("link", "set", name, "down", namespace=self._switch)

    def mend(self, name: str) -> None:
        """Puts the cable back."""
        ip("link", "set", name, "up", namespace=self._switch)

    def signal(self, name: str, number: int) -> None:
        """Sends a signal to all processes of the host."""
        for process in self._processes[name]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def kill(self, name: str) -> None:
        """Ends all processes of the host."""
        self.signal(name, signal.SIGKILL)
        for process in self._processes[name]:
            process.wait()

"""Runs a contender of a speed comparison as a user would, and combines the results of its ranks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List, Sequence

from tests.integration.hosts import Hosts, start_ranks

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ROOT / ".venv-bench" / "bin" / "torchrun"
HOROVODRUN = [str(Path(sys.executable).with_name("horovodrun")), "-np", "2"]
OWN_LAUNCHER = [sys.executable, "-m", "launch", "local", "-n", "2", "--quiet", "--"]
TIME_LIMIT_SECONDS = 900

Figures = Dict[str, float]
Contender = Callable[[Path], Figures]  # given the folder of the data, runs and measures a job


class ContenderFailed(SystemExit):
    """A contender failed; the text holds its command and its whole output."""


def peer(module: str, launcher: List[str], *options: str, **environment: str) -> Contender:
    """A contender: ``benchmarks.peers.MODULE`` under a launcher; calling it measures it."""
    command = [*launcher, sys.executable, "-m", f"benchmarks.peers.{module}"]
    return lambda data: measure([[*command, *options]], data, environment)


def torch(*options: str, ranks: int = 2, jobs: int = 1) -> Contender:
    """PyTorch DDP, in its own environment; or several of its jobs, at the same time."""
    script = str(ROOT / "benchmarks" / "peers" / "torch_ddp.py")
    # A standalone job looks for a free port.
    command = [str(TORCHRUN), "--standalone", f"--nproc_per_node={ranks}", script, *options]
    return lambda data: measure([command] * jobs, data, {})


def retried(contender: Contender) -> Contender:
    """The contender, run once more if its first run fails; the failure is printed.

    For peers that crash now and then through no fault of this project.
    """

    def run(data: Path) -> Figures:
        try:
            return contender(data)
        except ContenderFailed as failure:
            print(f"tried again, as {failure}", flush=True)
            return contender(data)

    return run


def horovod_gluon(*options: str) -> Contender:
    """A plain Horovod and Gluon script.

    Retried because a rank of it ended in a segmentation fault, whose cause is not known, in 1 of
    about 400 starts on busy cores.
    """
    return retried(peer("horovod_gluon", HOROVODRUN, *options))


def ours(*options: str, launcher: List[str] = HOROVODRUN) -> Contender:
    """This project as a contender."""
    return peer("this_project", launcher, *options)


def side_by_side(*options: str, jobs: int = 2) -> Contender:
    """Independent runs of one rank each, at the same time: the cores' limit, without a network."""
    command = [sys.executable, "-m", "benchmarks.peers.this_project", *options]
    return lambda data: measure([command] * jobs, data, {})


def over_hosts(
    rate: str, ranks_of_hosts: Sequence[int], *options: str, module: str = "this_project"
) -> Contender:
    """``benchmarks.peers.MODULE`` on hosts of this machine, whose sending is throttled; as root."""
    command = ["python", "-m", f"benchmarks.peers.{module}", *options]

    def start_on(hosts: Hosts, given: List[str]) -> List[subprocess.Popen]:
        return start_ranks(hosts, ranks_of_hosts, [*command, *given], {"OMP_NUM_THREADS": "1"})

    return lambda data: on_hosts(rate, len(ranks_of_hosts), start_on, data)


def torch_over_hosts(rate: str, hosts: int, ranks: int, *options: str) -> Contender:
    """PyTorch DDP on so many hosts with so many ranks each."""
    script = str(ROOT / "benchmarks" / "peers" / "torch_ddp.py")
    command = [str(TORCHRUN), f"--nnodes={hosts}", f"--nproc_per_node={ranks}"]
    command += ["--master_addr=10.77.0.1", "--master_port=29511"]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}

    def start_on(made: Hosts, given: List[str]) -> List[subprocess.Popen]:
        return [
            made.start(
                name, [*command, f"--node_rank={rank}", script, *options, *given], environment
            )
            for rank, name in enumerate(made.names)
        ]

    return lambda data: on_hosts(rate, hosts, start_on, data)


def on_hosts(
    rate: str,
    count: int,
    start_on: Callable[[Hosts, List[str]], List[subprocess.Popen]],
    data: Path,
) -> Figures:
    """Run one job on ``count`` hosts; ``start_on`` starts it, given the further options.

    Raises:
        ContenderFailed: a process of it failed.
        subprocess.TimeoutExpired: it took too long.
    """
    with tempfile.TemporaryDirectory() as folder, Hosts(count, Path(folder)) as hosts:
        hosts.throttle(rate)
        out = Path(folder, "out")
        out.mkdir()
        began = time.time()
        running = start_on(hosts, ["--data", str(data), "--out", str(out)])
        said = [process.communicate(timeout=TIME_LIMIT_SECONDS)[0] for process in running]
        if any(process.returncode for process in running):
            raise ContenderFailed("a job on hosts failed:\n" + "\n".join(said))
        ranks = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    return combined([ranks], began)


def measure(commands: List[List[str]], data: Path, environment: Dict[str, str]) -> Figures:
    """Run the commands at the same time and combine the results of their ranks.

    Raises:
        ContenderFailed: a command failed; the others have been killed.
        subprocess.TimeoutExpired: so have all, as one took too long.
    """
    began = time.time()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as leftovers:
        folders = [Path(temporary, str(number)) for number in range(len(commands))]
        running = []
        for command, folder in zip(commands, folders):
            folder.mkdir()
            process = start(command, data, folder, environment)
            leftovers.callback(process.wait)
            leftovers.callback(process.kill)
            running.append(process)
        for command, folder, process in zip(commands, folders, running):
            if process.wait(timeout=TIME_LIMIT_SECONDS):
                said = (folder / "log").read_text()
                raise ContenderFailed(f"{' '.join(command)} failed:\n{said}")
        jobs = [
            [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
            for folder in folders
        ]
    return combined(jobs, began)


def start(
    command: List[str], data: Path, folder: Path, environment: Dict[str, str]
) -> subprocess.Popen:
    """Start a contender, which writes its results and ``log`` into ``folder``."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    # Installed libraries have cached bytecode; let ours be cached by the first run.
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [*command, "--data", str(data), "--out", str(folder)]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log)


def combined(jobs: List[List[Figures]], began: float) -> Figures:
    """One result of several jobs that began at the same time, given the results of their ranks.

    Speeds of several jobs are added; of times and memory the maximum counts.
    """
    ranks = [rank for job in jobs for rank in job]
    figures = {"peak_mib": max(rank["peak_mib"] for rank in ranks)}
    if "seconds" in ranks[0]:
        figures["seconds"] = max(rank["seconds"] for rank in ranks)
    if "first_step_at" in ranks[0]:
        figures["first_step"] = max(rank["first_step_at"] for rank in ranks) - began
    if "images_per_second" in ranks[0]:
        figures["images_per_second"] = sum(job[0]["images_per_second"] for job in jobs)
    if "step_microseconds" in ranks[0]:
        figures["step_microseconds"] = max(rank["step_microseconds"] for rank in ranks)
    return figures

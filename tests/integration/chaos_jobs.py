"""The job of a trial (chaos.py): its command, its start and its end, and how far it has come."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

from tests.waiting import wait_until

from . import disks
from .commands import SMALL, start
from .saboteur import Fault

GLOO_TIMEOUT = 5
WATCHDOG = 10
LIMIT = 150.0
"""Seconds in which a trial's job must have ended, on a machine that is busy with other work."""
EPOCH, LAST = 16, 32  # steps of an epoch, and of a run
SETTINGS = [
    *SMALL,
    "model.factory=tests.integration.nets:steady",
    "train.epochs=2",
    "checkpoint.every_steps=3",
    f"train.watchdog_seconds={WATCHDOG}",
]
WRAPPER = ["bash", "-c", '"$0" "$@"; exit $?']
ENVIRONMENT = {"HOROVOD_GLOO_TIMEOUT_SECONDS": str(GLOO_TIMEOUT), "STEP_SECONDS": "0.05"}

# The launcher's or the trainer's line; or Horovod's, in ranks on hosts that nobody supervises.
TOLD = re.compile(
    "launch: |error: |another rank has ended|Timed out waiting .* for recv"
    "|Connection (closed|reset) by peer|caused pair closure"
)


class Trial(NamedTuple):
    """A kind of fault, and how many ranks it meets."""

    number: int
    kind: str
    ranks: int
    faults: List[Fault]
    step: int  # of faults that come from outside


def command(folder: Path, output: Path) -> List[str]:
    """That of each rank."""
    module = [sys.executable, "-m", "tests.integration.saboteur", str(folder)]
    return [*module, "train", *SETTINGS, f"output={output}"]


def job(trial: Trial, folder: Path, output: Path) -> List[str]:
    """A job that loses slots, or (every third) one that replaces lost ranks."""
    elastic = ["--max-restarts", "4"] + (["--min-ranks", "1"] if trial.number % 3 else [])
    launch = [sys.executable, "-m", "launch", "local", "-n", str(trial.ranks), "--kill-after", "2"]
    wrapper = WRAPPER if "launcher" in trial.kind else []
    words = [*launch, *elastic, "--", *wrapper, *command(folder, output)]
    slowly = {"STEP_SECONDS": "1"} if trial.kind == "second launch" else {}
    return disks.command_on({**ENVIRONMENT, **slowly, **_disk_like(trial, folder)}, *words)


def _disk_like(trial: Trial, folder: Path) -> Dict[str, str]:
    """Variables that make the run's disk what the trial is about."""
    for words, lacking in (
        ("no locks", {"flock": 38}),  # ENOSYS
        ("no folder sync", {"sync_folder": 22}),  # EINVAL
        ("slow sync", {"sync_seconds": 2}),
    ):
        if words in trial.kind:
            return disks.like(folder, **lacking)
    return {}


def begin(trial: Trial, folder: Path, output: Path) -> subprocess.Popen:
    """Start the job."""
    return start(job(trial, folder, output))


def end(process: subprocess.Popen) -> Any:
    """The exit code of a job, and what it said."""
    try:
        said = process.communicate(timeout=LIMIT)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"not ended in {LIMIT} s:\n{process.communicate()[0]}") from None
    return process.returncode, said


def end_all(processes: Sequence[subprocess.Popen]) -> Any:
    """The exit codes of ranks, and what they said."""
    ends = [end(process) for process in processes]
    return [code for code, _ in ends], "".join(words or "" for _, words in ends)


def wait_for_step(folder: Path, step: int) -> None:
    """Until the job has done it."""
    wait_until(
        lambda: last_step(folder) >= step, lambda: f"stands at step {last_step(folder)}", LIMIT
    )


def last_step(folder: Path) -> int:
    """The last that the job has done; 0 if none."""
    path = folder / "steps"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(lines[-1].split()[1]) if lines else 0


def note(folder: Path) -> None:
    """Write down that something from outside strikes now."""
    (folder / "outside").write_text(f"{time.time()} {last_step(folder)}")

"""Trials: a run on some ranks, something that goes wrong in it, and what must come of it.

Each must end complete, with the weights of a run that nothing disturbed (to rounding), or with an
error within its time; then the same command, once what was wrong is mended, must complete it.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

import mxnet as mx
import numpy as np

from tests.waiting import wait_until
from trainer import checkpoint

from . import hosts
from .commands import SMALL, run, start, trainer
from .saboteur import SIGNALS, Fault

GLOO_TIMEOUT = 5
WATCHDOG = 20
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

# What goes wrong, and where; a trial's number chooses, so that as many trials have all of them.
KINDS = [
    "kill step",
    "kill step, kill step",
    "damage",
    "kill save",
    "stop step",
    "cut",
    "fill step",
    "term step",
    "crash evaluation",
    "kill last",
    "kill first",
    "stop save",
    "crash step",
    "stop step, kill step",
    "kill evaluation",
    "abort step",
    "short cut",
    "kill start",
    "stop start",
    "term start",
    "crash first",
    "crash last",
    "stop evaluation",
    "crash save",
    "kill start, stop step",
    "hang step",
]


class Trial(NamedTuple):
    """A kind of fault, and how many ranks it meets."""

    number: int
    kind: str
    ranks: int
    faults: List[Fault]
    step: int  # of faults that come from outside


WENT_ON = "went on"
AGAIN = "ended with an error, completed when started again"


class Result(NamedTuple):
    """What came of a trial."""

    trial: Trial
    outcome: str  # WENT_ON or AGAIN
    because: Optional[str]  # the lines that told of the error
    recovery: Optional[float]  # seconds from the fault until the step it struck was done
    difference: float  # from the undisturbed weights, the largest


def choose(seed: int, number: int) -> Trial:
    """The trial of that number; the same for the same seed."""
    chance = random.Random(f"{seed} {number}")
    kind = KINDS[number % len(KINDS)]
    faults = [_fault(words, chance) for words in kind.split(", ") if words.split()[0] in _HOW]
    return Trial(number, kind, chance.randint(2, 4), faults, chance.randint(4, LAST - 4))


# The launcher's or the trainer's line; or Horovod's, in ranks on hosts that nobody supervises.
_TOLD = re.compile(
    "launch: |error: |Timed out waiting .* for recv|Connection closed by peer|caused pair closure"
)
_HOW = (*SIGNALS, "crash", "hang", "fill")


def _fault(words: str, chance: random.Random) -> Fault:
    how, place = words.split()
    last = LAST - 1
    number = {"first": 0, "last": last, "save": chance.randint(4, last), "evaluation": EPOCH - 1}
    return Fault(
        how,
        "step" if place in ("first", "last") else place,
        0 if place == "save" or how == "fill" else chance.randrange(4),
        number.get(place, chance.randint(1, 3000 if place == "start" else LAST - 2)),
        chance.random() * 0.1,
    )


def straight(folder: Path) -> Dict[str, np.ndarray]:
    """The weights of a run that nothing disturbs, on one rank."""
    done = run(trainer("train", *SETTINGS, f"output={folder}"))
    assert done.code == 0, done.err
    return _weights(folder)


def _weights(output: Path) -> Dict[str, np.ndarray]:
    path = checkpoint.find_latest(output / "default" / "checkpoints", print)
    assert path is not None and path.name == f"step-{LAST:08d}", path
    return {name: a.asnumpy() for name, a in mx.nd.load(str(path / checkpoint.PARAMETERS)).items()}


def run_trial(trial: Trial, folder: Path, expected: Dict[str, np.ndarray]) -> Result:
    """Make a trial in `folder`, which is empty; an AssertionError tells what did not hold."""
    (folder / "faults.json").write_text(json.dumps([fault._asdict() for fault in trial.faults]))
    with _disk(folder, "fill" in trial.kind) as output:
        if trial.kind == "damage":
            code, said = _killed_and_damaged(trial, folder, output)
        elif "cut" in trial.kind:
            code, said = _cut(trial, folder, output)
        else:
            code, said = _end(_start(trial, folder, output))
        outcome, because = WENT_ON, None
        if code != 0:
            told = [line for line in said.splitlines() if _TOLD.search(line)]
            assert told, said
            outcome, because = AGAIN, "\n".join(told[-6:])
            with contextlib.suppress(FileNotFoundError):
                (output / "filler").unlink()
            code, again = _end(_start(trial, folder, output))
            assert code == 0, said + again
        struck = len(list(folder.glob("struck-*")))
        assert struck == len(trial.faults), f"{struck} faults struck\n{said}"
        found = _weights(output)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4, err_msg=said)
    difference = max(float(np.abs(found[name] - expected[name]).max()) for name in expected)
    return Result(trial, outcome, because, _recovery(trial, folder), difference)


def _command(folder: Path, output: Path) -> List[str]:
    module = [sys.executable, "-m", "tests.integration.saboteur", str(folder)]
    return [*module, "train", *SETTINGS, f"output={output}"]


def _start(trial: Trial, folder: Path, output: Path) -> subprocess.Popen:
    """A job that loses slots, or (every third) one that replaces lost ranks."""
    elastic = ["--max-restarts", "4"] + (["--min-ranks", "1"] if trial.number % 3 else [])
    launch = [sys.executable, "-m", "launch", "local", "-n", str(trial.ranks), "--kill-after", "2"]
    gloo = f"HOROVOD_GLOO_TIMEOUT_SECONDS={GLOO_TIMEOUT}"
    job = [*launch, *elastic, "--", *_command(folder, output)]
    return start(["env", gloo, "STEP_SECONDS=0.05", *job])


def _end(process: subprocess.Popen) -> Any:
    """The exit code of a job, and what it said."""
    try:
        said = process.communicate(timeout=LIMIT)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"not ended in {LIMIT} s:\n{process.communicate()[0]}") from None
    return process.returncode, said


@contextlib.contextmanager
def _disk(folder: Path, tiny: bool) -> Iterator[Path]:
    """Where the run's folder is: on a disk of two megabytes of its own if `tiny`."""
    disk = folder / "disk"
    disk.mkdir()
    if not tiny:
        yield disk
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _wait_for_step(folder: Path, step: int) -> None:
    wait_until(
        lambda: _last_step(folder) >= step, lambda: f"stands at step {_last_step(folder)}", LIMIT
    )


def _last_step(folder: Path) -> int:
    path = folder / "steps"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(lines[-1].split()[1]) if lines else 0


def _note(folder: Path) -> None:
    """Write down that something from outside strikes now."""
    (folder / "outside").write_text(f"{time.time()} {_last_step(folder)}")


def _killed_and_damaged(trial: Trial, folder: Path, output: Path) -> Any:
    """All processes are killed, and one byte of the newest checkpoint is turned."""
    job = _start(trial, folder, output)
    try:
        _wait_for_step(folder, 8 + trial.step // 2)  # so that two have been written
        _note(folder)
    finally:
        job.kill()
        job.communicate()
    chance = random.Random(trial.number)
    newest = checkpoint.find_latest(output / "default" / "checkpoints", print)
    assert newest is not None
    path = chance.choice(sorted(newest.iterdir()))
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 + chance.randrange(255)
    path.write_bytes(content)
    code, said = _end(_start(trial, folder, output))
    assert "using the checkpoint before it" in said, said
    return code, said


def _cut(trial: Trial, folder: Path, output: Path) -> Any:
    """Ranks on hosts of their own, of which one loses its cable: for good, or for a second."""
    shared = {"STEP_SECONDS": "0.05", "HOROVOD_GLOO_TIMEOUT_SECONDS": str(GLOO_TIMEOUT)}
    rank = [sys.executable, "-m", "launch", "slurm-rank", "--", *_command(folder, output)]
    with hosts.Hosts(trial.ranks, folder) as made:
        ranks = [
            made.start(name, rank, {**hosts.slurm_variables(n, trial.ranks), **shared})
            for n, name in enumerate(made.names)
        ]
        _wait_for_step(folder, trial.step)
        lost = made.names[trial.step % trial.ranks]
        _note(folder)
        made.cut(lost)
        if trial.kind == "short cut":
            time.sleep(1.0)
            made.mend(lost)
        ends = [_end(process) for process in ranks]
    said = "".join(words for _, words in ends)
    codes = [code for code, _ in ends]
    assert all(codes) or trial.kind == "short cut", said
    return max(codes), said


def _recovery(trial: Trial, folder: Path) -> Optional[float]:
    """Seconds from the last fault until the step that it struck was done, by ranks started after.

    None where no step was left to do, and for faults that end no rank.
    """
    if trial.kind in ("fill step", "short cut"):
        return None
    struck = sorted([*folder.glob("struck-*"), *folder.glob("outside")])
    when, step = struck[-1].read_text().split()
    for line in (folder / "steps").read_text().splitlines():
        done, number, before = line.split()
        if int(before) == len(struck) and int(number) > int(step):
            return float(done) - float(when)
    return None

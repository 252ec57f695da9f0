"""Trials: a run on some ranks, something that goes wrong in it, and what must come of it.

Each must end complete, with the weights of a run that nothing disturbed (to rounding), or with an
error within its time; then the same command, once what was wrong is mended, must complete it.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
from pathlib import Path
from typing import Dict, Iterator, NamedTuple, Optional

import mxnet as mx
import numpy as np

from trainer import checkpoint

from .chaos_jobs import EPOCH, LAST, SETTINGS, TOLD, Trial, begin, end
from .chaos_outside import FROM_OUTSIDE
from .commands import run, trainer
from .saboteur import SIGNALS, Fault

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
    "kill step, no locks",
    "kill step, no folder sync",
    "kill step, slow sync",
    "kill launcher",
    "host cut",
    "remove folder",
    "sealed damage",
    "kill leader",
    "second launch",
    "host stopped",
    "close stdout",
]


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
    inside = [] if kind in FROM_OUTSIDE else kind.split(", ")
    faults = [_fault(words, chance) for words in inside if words.split()[0] in _HOW]
    return Trial(number, kind, chance.randint(2, 4), faults, chance.randint(4, LAST - 4))


# Faults that no rank ends by, so that there is nothing to recover from.
ENDS_NO_RANK = ("fill step", "short cut", "remove folder", "second launch", "close stdout")
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
        if trial.kind in FROM_OUTSIDE:
            code, said = FROM_OUTSIDE[trial.kind](trial, folder, output)
        else:
            code, said = end(begin(trial, folder, output))
        outcome, because = WENT_ON, None
        if code != 0:
            told = [line for line in said.splitlines() if TOLD.search(line)]
            assert told, said
            outcome, because = AGAIN, "\n".join(told[-6:])
            with contextlib.suppress(FileNotFoundError):
                (output / "filler").unlink()
            code, again = end(begin(trial, folder, output))
            assert code == 0, said + again
        struck = len(list(folder.glob("struck-*")))
        assert struck == len(trial.faults), f"{struck} faults struck\n{said}"
        found = _weights(output)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4, err_msg=said)
    difference = max(float(np.abs(found[name] - expected[name]).max()) for name in expected)
    return Result(trial, outcome, because, _recovery(trial, folder), difference)


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


def _recovery(trial: Trial, folder: Path) -> Optional[float]:
    """Seconds from the last fault until the step that it struck was done, by ranks started after.

    None where no step was left to do, and for faults that end no rank.
    """
    if trial.kind in ENDS_NO_RANK:
        return None
    struck = sorted([*folder.glob("struck-*"), *folder.glob("outside")])
    when, step = struck[-1].read_text().split()
    for line in (folder / "steps").read_text().splitlines():
        done, number, before = line.split()
        if int(before) == len(struck) and int(number) > int(step):
            return float(done) - float(when)
    return None

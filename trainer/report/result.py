"""A run's ``result.json``, and what is known of a run from the files in its folder.

Rank 0 writes ``result.json``: at the start with the state ``unfinished``, at the end with the
results. The progress of a run that was killed is read from its checkpoints.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

from .. import checkpoint
from ..checkpoint import whole_file
from ..errors import UserError

RESULT = "result.json"


class RunsError(UserError):
    """There is no run where one was looked for: where, what is there, the fix."""


class Run(NamedTuple):
    """What is known about a run; None where a value is unknown."""

    name: str
    started: Optional[str]  # ISO 8601, UTC
    # done, stopped (by a signal; resumes when trained again), stopped early (by train.patience),
    # unfinished or unreadable
    state: str
    step: int  # steps made and saved
    last_step: Optional[int]  # where it ends, unless it stops early
    epochs: Optional[int]  # as configured
    ranks: Optional[int]
    accuracy: Optional[float]  # of the last evaluation, of the validation or else the test set
    loss: Optional[float]
    best_accuracy: Optional[float]
    images_per_second: Optional[float]
    seconds: Optional[float]  # of the process that ended it
    test_accuracy: Optional[float] = None  # beside a validation set


def write_result(folder: Path, **figures: Any) -> None:
    """Replace a run's ``result.json`` atomically."""
    with whole_file.replaced(folder / RESULT) as partial:
        partial.write_text(json.dumps(figures, indent=1) + "\n")


def now() -> str:
    """The current time in the format of ``result.json``: ISO 8601, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def read(folder: Path) -> Run:
    """The run in ``folder``.

    Raises:
        RunsError: there is none, or its files cannot be read.
    """
    if not (folder / "config.yaml").is_file():
        raise RunsError(
            f"{folder} is no run: it holds no config.yaml; see `python -m trainer runs FOLDER`"
        )
    figures: Dict[str, Any] = {"state": "unfinished"}
    if (folder / RESULT).is_file():
        figures.update(_json(folder / RESULT))
    if figures["state"] == "unfinished":
        figures.update(_saved(folder / "checkpoints"))
    known: Dict[str, Any] = {name: figures.get(name) for name in Run._fields}
    for name, value in known.items():
        expected = str if name in ("name", "started", "state") else (int, float)
        if value is not None and not isinstance(value, expected):
            raise RunsError(f"{folder / RESULT} cannot be read: {name} is {value!r}")
    return Run(**{**known, "name": folder.name, "step": known["step"] or 0})


def _json(path: Path) -> Dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunsError(f"{path} cannot be read: {error}") from None


def _saved(checkpoints: Path) -> Dict[str, Any]:
    """The progress of an unfinished run, from its checkpoints."""
    for path in reversed(checkpoint.listing(checkpoints)):
        with contextlib.suppress(OSError, ValueError, RecursionError):  # damaged: try an older one
            state = checkpoint.read_state(path)
            best = checkpoint.find_best(checkpoints)
            return {
                "step": state.step,
                "accuracy": state.accuracy,
                "best_accuracy": checkpoint.read_state(best).accuracy if best else None,
            }
    return {}

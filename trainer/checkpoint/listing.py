"""The checkpoints in a run's folder: all, the newest valid one, the best."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Callable, List, Optional

from .files import problem
from .state import read_state


def find_latest(
    folder: Path, report: Callable[[str], None], launch: Optional[str] = None
) -> Optional[Path]:
    """The newest valid checkpoint below ``folder``; damaged ones are reported and skipped.

    Args:
        report: called with a message for each damaged one.
        launch: consider only those whose ``state["launch"]`` is this.
    """
    for path in reversed(listing(folder)):
        if launch is not None and _of_state(path, "launch") != launch:
            continue
        wrong = problem(path)
        if wrong is None:
            return path
        report(f"{wrong}; using the checkpoint before it")
    return None


def find_best(folder: Path) -> Optional[Path]:
    """The checkpoint of the highest test accuracy below ``folder``; of equals, the newest."""
    scored = [(_accuracy(path), path) for path in listing(folder)]
    known = [(accuracy, path) for accuracy, path in scored if accuracy is not None]
    return max(known)[1] if known else None


def _accuracy(path: Path) -> Optional[float]:
    accuracy = _of_state(path, "accuracy")
    return accuracy if isinstance(accuracy, float) else None


def _of_state(path: Path, name: str) -> Any:
    """One value of a checkpoint's state; None where it is missing or the state unreadable."""
    try:
        return read_state(path).get(name)
    # A damaged checkpoint is not the best; find_latest reports it.
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def step_of(path: Path) -> int:
    """The step of the checkpoint at ``path``, from its name."""
    return int(path.name[len("step-") :])


def listing(folder: Path) -> List[Path]:
    """The checkpoints below ``folder``, oldest first, damaged ones included."""
    return sorted(folder.glob("step-[0-9]*"))


def prune(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the newest ``keep`` and the one of the highest accuracy."""
    best = find_best(folder)
    for path in listing(folder)[:-keep]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)

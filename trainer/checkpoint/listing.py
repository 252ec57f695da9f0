"""The checkpoints in a run's folder: all, the newest valid one, the best."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Callable, List, Optional

from .files import problem
from .state import RunState, read_state


def find_latest(
    folder: Path, report: Callable[[str], None], launch: Optional[str] = None
) -> Optional[Path]:
    """The newest valid checkpoint below ``folder``; damaged ones are reported and skipped.

    Args:
        report: called with a message for each damaged one.
        launch: consider only those whose state names this launch.
    """
    for path in reversed(listing(folder)):
        state = None if launch is None else _state(path)
        if launch is not None and (state is None or state.launch != launch):
            continue
        wrong = problem(path)
        if wrong is None:
            return path
        report(f"{wrong}; using the checkpoint before it")
    return None


def find_best(folder: Path) -> Optional[Path]:
    """The checkpoint of the highest test accuracy below ``folder``; of equals, the newest."""
    states = [(_state(path), path) for path in listing(folder)]
    scored = [(s.accuracy, path) for s, path in states if s and s.accuracy is not None]
    return max(scored)[1] if scored else None


def _state(path: Path) -> Optional[RunState]:
    """A checkpoint's state; None where it cannot be read."""
    try:
        return read_state(path)
    # A damaged checkpoint is not the best; find_latest reports it.
    except (OSError, ValueError, RecursionError):
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

"""Why a run cannot go on, and from which checkpoint it can be resumed."""

from __future__ import annotations

from . import checkpoint, resume
from .config import Config
from .metrics import NonFiniteError


class TrainingError(RuntimeError):
    """The run cannot go on, on any rank; says why, and from which checkpoint to resume."""


def not_finite(config: Config, error: NonFiniteError) -> TrainingError:
    """The loss or a weight is not finite."""
    way_out = (
        "Lower optimizer.lr, lengthen schedule.warmup_epochs or set optimizer.clip_norm"
        if error.step
        else "Nothing was learnt before it: look at the net's own arithmetic and weights"
    )
    return TrainingError(f"{error}; {_last_good(config)}. {way_out}")


def not_saved(config: Config, step: int, last_step: int, reason: str) -> TrainingError:
    """The last checkpoint, after ``step`` steps, could not be written."""
    return TrainingError(
        f"the run made {step} of {last_step} steps, but {reason}; {_last_good(config)}"
    )


def _last_good(config: Config) -> str:
    saved = checkpoint.listing(resume.checkpoint_folder(config))
    return f"the last good checkpoint is {saved[-1]}" if saved else "nothing was saved before"

"""The function of the user's that ``fit`` calls at the end of each epoch."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from .. import checkpoint
from ..config import Config
from ..errors import ConfigError, show
from ..step.evaluation import Evaluation
from ..step.metrics import Means, NonFiniteError


class EpochEnd(NamedTuple):
    """What is known at the end of an epoch; the same on every rank."""

    epoch: int  # from 1
    step: int  # steps made since the beginning of the run
    training: Means  # over the epoch's samples
    # On the validation set, or else the test set; None where evaluate.every_epochs skips it
    evaluation: Optional[Evaluation]


OnEpochEnd = Callable[[EpochEnd], Any]


def check(function: OnEpochEnd) -> None:
    """Refuse what cannot be called with one argument, before the first epoch is trained.

    Raises:
        ConfigError: ``function`` takes another number of arguments, or is no function.
    """
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise ConfigError(
            f"on_epoch_end is {show(function)}; it must be a function of one argument, an "
            f"EpochEnd ({error})"
        ) from None
    except ValueError:  # some functions written in C do not say what they take
        pass


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


def parted(config: Config, step: int, where: str) -> TrainingError:
    """The ranks' weights are no longer alike."""
    return TrainingError(
        f"the ranks' weights have parted after {step} steps: {where}; {_last_good(config)}. Look "
        "for what differs between ranks: a forward or loss that depends on the rank, libraries or "
        "processors of another kind"
    )


def not_saved(config: Config, step: int, last_step: int, reason: str) -> TrainingError:
    """The last checkpoint, after ``step`` steps, could not be written."""
    return TrainingError(
        f"the run made {step} of {last_step} steps, but {reason}; {_last_good(config)}"
    )


def _last_good(config: Config) -> str:
    saved = checkpoint.listing(config.checkpoint_folder)
    return f"the last good checkpoint is {saved[-1]}" if saved else "nothing was saved before"


class Result(NamedTuple):
    """How a run ended."""

    folder: Path
    steps: int
    # On the validation set, or else the test set; None if there is neither, or the run was stopped
    evaluation: Optional[Evaluation]
    images_per_second: Optional[float]  # over all ranks, without warm-up and pauses
    stopped: bool  # by a signal, before its end; it can be resumed from its checkpoint
    stopped_early: bool = False  # by train.patience
    test: Optional[Evaluation] = None  # on the test set, once, beside a validation set

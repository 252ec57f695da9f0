"""The functions of the user's that ``fit`` calls, and how and when a run ends."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from .. import checkpoint, dist
from ..config import Config
from ..dist import environment
from ..dist.preemption import EXIT_CODE, StopRequest
from ..errors import ConfigError, show
from ..step.evaluation import Evaluation
from ..step.metrics import Means, NonFiniteError
from ..step.step import StepResult


class StepEnd(NamedTuple):
    """What a rank knows when a step has been enqueued; each rank has its own."""

    epoch: int  # from 1
    step: int  # steps made since the beginning of the run
    lr: float
    samples: int  # of this rank's in the step's global batch
    # Sums over these samples, float32 (1,) on the device: reading one waits for the step
    result: StepResult


class EvaluationEnd(NamedTuple):
    """What is known after an evaluation; the same on every rank."""

    step: int  # steps made since the beginning of the run
    set: str  # test or validation
    evaluation: Evaluation


class EpochEnd(NamedTuple):
    """What is known at the end of an epoch; the same on every rank."""

    epoch: int  # from 1
    step: int  # steps made since the beginning of the run
    training: Means  # over the epoch's samples
    # On the validation set, or else the test set; None where evaluate.every_epochs skips it
    evaluation: Optional[Evaluation]


class Hooks(NamedTuple):
    """The functions of the user's that ``fit`` calls on every rank; what they return is ignored."""

    on_step: Optional[Callable[[StepEnd], Any]] = None
    on_evaluation: Optional[Callable[[EvaluationEnd], Any]] = None
    on_epoch_end: Optional[Callable[[EpochEnd], Any]] = None

    def check(self) -> None:
        """Refuse what cannot be called with one argument, before the first step. Raises
        ConfigError: one takes another number of arguments, or is no function.
        """
        given = ("a StepEnd", "an EvaluationEnd", "an EpochEnd")
        for name, function, what in zip(self._fields, self, given):
            try:
                inspect.signature(function or print).bind(None)
            except TypeError as error:
                raise ConfigError(
                    f"{name} is {show(function)}; it must be a function of one argument, {what} "
                    f"({error})"
                ) from None
            except ValueError:  # some functions written in C do not say what they take
                pass


class Plateau(NamedTuple):
    """What a run remembers of its evaluations; it is saved in every checkpoint.

    By it a run whose accuracy no longer rises ends, or learns more slowly.
    """

    best_accuracy: float = -1.0  # the highest so far; below any before the first evaluation
    evaluations: int = 0  # in a row since then
    reductions: int = 0  # of the learning rate

    def after(self, accuracy: float, patience: Optional[int] = None) -> Plateau:
        """After one more evaluation; with the ``schedule.patience``, if there is one."""
        if accuracy > self.best_accuracy:
            return Plateau(accuracy, 0, self.reductions)
        evaluations = self.evaluations + 1
        reduced = patience is not None and evaluations % patience == 0
        return Plateau(self.best_accuracy, evaluations, self.reductions + reduced)

    def outlasts(self, patience: Optional[int]) -> bool:
        """Whether ``train.patience`` is exhausted; never where it is None."""
        return patience is not None and self.evaluations >= patience


class Stopped(Exception):  # noqa: N818
    """The run was asked to stop, and all ranks do so here."""


class TrainingError(RuntimeError):
    """The run cannot go on, on any rank; says why, and from which checkpoint to resume."""


def not_finite(config: Config, error: NonFiniteError) -> TrainingError:
    """The loss or a weight is not finite."""
    way_out = "Nothing was learnt before it: look at the net's own arithmetic and weights"
    if error.step:
        way_out = "Lower optimizer.lr, lengthen schedule.warmup_epochs or set optimizer.clip_norm"
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
    saved = checkpoint.find_latest(config.checkpoint_folder, report=lambda wrong: None)
    return f"the last good checkpoint is {saved}" if saved else "nothing was saved before"


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


def unless_stopped(result: Result, stop: StopRequest) -> Result:
    """``result``; but a script must not go on where a stop was asked for, even at the very end."""
    if stop.interrupted:
        raise KeyboardInterrupt("saved")
    launched = environment.launch_id() is not None
    if launched and (result.stopped or dist.any_rank(stop.requested, "stop_at_the_end")):
        dist.shutdown()
        raise SystemExit(EXIT_CODE)
    return result

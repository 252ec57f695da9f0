"""The function of the user's that ``fit`` calls at the end of each epoch."""

from __future__ import annotations

import inspect
from typing import Any, Callable, NamedTuple, Optional

from .metrics import Evaluation, Means
from .settings import ConfigError, show


class EpochEnd(NamedTuple):
    """What is known at the end of an epoch; the same on every rank."""

    epoch: int  # from 1
    step: int  # steps made since the beginning of the run
    training: Means  # over the epoch's samples
    evaluation: Optional[Evaluation]  # on the test set; None where evaluate.every_epochs skips it


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

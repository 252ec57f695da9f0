"""The functions given to `fit` are looked at before anything starts."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.run.outcome import Hooks


class Logger:
    def __call__(self, end: Any) -> None:
        """As an object with state does."""

    def log(self, end: Any, prefix: str = "") -> None:
        """As a method."""


@pytest.mark.parametrize(
    "function",
    [
        print,
        max,  # does not say what it takes
        Logger(),
        Logger().log,
        lambda *args: None,
        functools.partial(Logger().log, prefix="a"),
    ],
)
def test_what_takes_one_argument_is_accepted(function: Any) -> None:
    Hooks(on_epoch_end=function).check()


@pytest.mark.parametrize("function", [3, {"epoch": 1}, lambda: None, lambda a, b: None, Logger.log])
def test_what_does_not_is_refused_in_one_line(function: Any) -> None:
    for name in Hooks._fields:
        with pytest.raises(ConfigError, match=f"{name} is .*; it must be .* one argument") as bad:
            Hooks(**{name: function}).check()
        assert "\n" not in str(bad.value)

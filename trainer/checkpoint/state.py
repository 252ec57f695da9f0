"""A checkpoint's ``state.json``: what a run remembers besides its arrays, and its validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np

from ..errors import UserError, show

PARAMETERS, OPTIMIZER, STATE, MANIFEST = (
    "model.params",
    "optimizer.params",
    "state.json",
    "manifest.json",
)


class CheckpointError(UserError):
    """A checkpoint cannot be used: which, why, and the fix."""


def read_state(path: Path) -> Dict[str, Any]:
    """A checkpoint's ``state.json``.

    Raises:
        CheckpointError: a value is missing or of the wrong type.
    """
    state = json.loads((path / STATE).read_text())
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE} holds no state of a run")
    for name, fits in _FITS.items():
        if not fits(state.get(name)):
            raise CheckpointError(f"{path / STATE} says {name} is {show(state.get(name))}")
    return state


def _are_totals(value: Any) -> bool:
    """Whether ``value`` looks like ``TrainMetrics.totals()``: two rows of three sums."""
    try:
        return np.shape(value) == (2, 3) and all(0 <= n < np.inf for row in value for n in row)
    except (TypeError, ValueError):
        return False


def _is_image_shape(value: Any) -> bool:
    """Whether ``value`` is [height, width] or [height, width, channels]."""
    sizes = isinstance(value, list) and all(type(n) is int and 0 < n < 2**16 for n in value)
    return sizes and len(value) in (2, 3)


def is_plateau(value: Any) -> bool:
    """Whether ``value`` is what early stopping remembers: best accuracy, evaluations since."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    accuracy, evaluations = value
    return type(accuracy) is float and type(evaluations) is int and 0 <= evaluations < 2**53


# What a resumed run reads from its state, and how to validate it.
_FITS: Dict[str, Callable[[Any], bool]] = {
    "step": lambda value: type(value) is int and 0 <= value < 2**53,
    "totals": _are_totals,
    "accuracy": lambda value: value is None or isinstance(value, float),
    "config": lambda value: isinstance(value, dict),
    "image_shape": lambda value: value is None or _is_image_shape(value),  # None in older ones
    "train_size": lambda value: value is None or type(value) is int,  # None in older ones
    "optimizer": lambda value: isinstance(value, dict),
    "plateau": lambda value: value is None or is_plateau(value),  # None in older ones
}

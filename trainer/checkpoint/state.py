"""A checkpoint's ``state.json``: what a run remembers besides its arrays, and its validation."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Union

import numpy as np

from ..config import recorded
from ..errors import UserError, show

PARAMETERS, OPTIMIZER = "model.params", "optimizer.params"
STATE, MANIFEST = "state.json", "manifest.json"

FORMAT = 1  # of state.json; files of version 0.1 have no number, which counts as 0


class CheckpointError(UserError):
    """A checkpoint cannot be used: which, why, and the fix."""


@dataclass(frozen=True)
class RunState:
    """What a run remembers between two steps, besides its arrays; ``state.json`` holds it."""

    step: int = 0  # steps made
    # [loss sum, correct, samples] of the window and of the epoch, see TrainMetrics.totals
    totals: Sequence[Sequence[Union[float, int]]] = ((0.0,) * 3,) * 2
    accuracy: Optional[float] = None  # of the evaluation after this step, if there was one
    plateau: Optional[Sequence[Any]] = None  # see run/outcome.py
    loss_scale: Optional[Sequence[float]] = None  # in float16, see model/loss_scale.py
    config: Dict[str, Any] = field(default_factory=dict)
    image_shape: Optional[Sequence[int]] = None  # (H, W) or (H, W, C), before any resizing
    train_size: Optional[int] = None  # training images
    # What the set calls classes 0, 1, ..., numbers or texts; None where it uses these numbers
    classes: Optional[Sequence[Union[int, str]]] = None
    class_names: Optional[Sequence[str]] = None  # of each score of the net
    launch: Optional[str] = None  # id of the launch that saved it
    made_of: Dict[str, str] = field(default_factory=dict)  # digests, see run/agreement.py
    weights: Optional[str] = None  # digest of the trained weights
    given: bool = False  # the net was given to fit(), and config.model may name another
    # Scores of the net for a fixed input, see inference/trained_model.py
    answers: Optional[Sequence[float]] = None
    optimizer: Dict[str, Any] = field(default_factory=dict)  # its counters, see optimizer_state

    def as_json(self) -> str:
        """The content of ``state.json``, for :func:`read_state`."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)


def read_state(path: Path) -> RunState:
    """The state in the checkpoint at ``path``, of this format or an earlier one. Raises
    CheckpointError: it was written by a later version, or a value is missing, unknown or of the
    wrong type.
    """
    if not (path / STATE).is_file():  # nor a pipe, or a device, of which there is no end
        raise CheckpointError(f"{path / STATE} is missing")
    values = json.loads((path / STATE).read_text())
    if not isinstance(values, dict):
        raise CheckpointError(f"{path / STATE} holds no state of a run")
    number = values.pop("format", 0)
    if type(number) is not int or not 0 <= number <= FORMAT:
        raise CheckpointError(
            f"{path / STATE} has format {show(number)}, and this version reads formats up to "
            f"{FORMAT}: use the version that wrote it, or a later one"
        )
    kinds = typing.get_type_hints(RunState)
    unknown = sorted(values.keys() - kinds.keys())
    if unknown:
        raise CheckpointError(f"{path / STATE} has {show(unknown[0])}, which format {number} lacks")
    for name, kind in kinds.items():
        value = values.get(name)
        missing = value is None and name not in _REQUIRED
        if not missing and not (_is(kind, value) and _FITS.get(name, lambda _: True)(value)):
            raise CheckpointError(f"{path / STATE} says {name} is {show(value)}")
    values["config"] = recorded(values["config"])
    return RunState(**{name: value for name, value in values.items() if value is not None})


def check_answers(path: Path, state: RunState, found: Sequence[float], way_out: str) -> None:
    """Refuse a net that fits the parameters but gives other scores than the one that was saved:
    CheckpointError. It has ``found`` these for the fixed input.
    """
    if not state.answers or not found:  # older ones have none, nor nets with chance in inference
        return
    if not same_answers(found, state.answers):
        raise CheckpointError(
            f"{path} is of another net: this one has the same parameters, but gives other scores; "
            f"{way_out}"
        )


def same_answers(found: Sequence[float], known: Sequence[float]) -> bool:
    """Whether a net that has ``found`` these scores is the one of those that are ``known``."""
    atol = 0.02 * np.abs(known).max()  # on another device, or by other kernels, it is off by less
    return len(found) == len(known) and np.allclose(found, known, rtol=0, atol=atol)


def _is(kind: Any, value: Any) -> bool:
    """Whether a value of JSON is of an annotated type, to the letter: 1 is no float."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Union:
        return any(_is(one, value) for one in inner)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(_is(inner[1], item) for item in value.values())
    if inner:
        return isinstance(value, list) and all(_is(inner[0], item) for item in value)
    return kind is Any or type(value) is kind


def _are_totals(value: Any) -> bool:
    """Whether ``value`` looks like ``TrainMetrics.totals()``: two rows of three sums.

    That of a loss of the user's own may be negative; counts never are.
    """
    return [len(row) for row in value] == [3, 3] and all(
        abs(loss) < np.inf and all(0 <= n < np.inf for n in counts) for loss, *counts in value
    )


def is_plateau(value: Any) -> bool:
    """Whether ``value`` is what run/outcome.py remembers; in older ones it has no third."""
    if not isinstance(value, list) or len(value) not in (2, 3):
        return False
    accuracy, *counts = value
    return type(accuracy) is float and all(type(n) is int and 0 <= n < 2**53 for n in counts)


_REQUIRED = "step", "totals", "config", "optimizer"  # older versions wrote no others

# What a value has to be, besides of its annotated type.
_FITS: Dict[str, Callable[[Any], bool]] = {
    "step": lambda step: 0 <= step < 2**53,
    "totals": _are_totals,
    "plateau": is_plateau,
    "image_shape": lambda sizes: len(sizes) in (2, 3) and all(0 < n < 2**16 for n in sizes),
    # A scale, good steps and skipped steps.
    "loss_scale": lambda found: len(found) == 3 and found[0] > 0 and min(found) >= 0,
}

"""When a run whose test accuracy no longer rises ends."""

from __future__ import annotations

import json
from typing import Any, List

import pytest

from trainer.checkpoint.state import is_plateau
from trainer.run.early_stopping import Plateau


def evaluations_made(accuracies: List[float], patience: int) -> int:
    """After how many of these evaluations a run ends."""
    plateau = Plateau()
    for made, accuracy in enumerate(accuracies, start=1):
        plateau = plateau.after(accuracy)
        if plateau.outlasts(patience):
            return made
    return len(accuracies)


@pytest.mark.parametrize(
    ("accuracies", "patience", "expected"),
    [
        ([0.0] * 5, 1, 2),  # the first is always the highest so far
        ([0.5, 0.5, 0.5, 0.5], 2, 3),  # an equal one is not higher
        ([0.5, 0.4, 0.6, 0.5, 0.55, 0.7], 2, 5),  # not higher than the best, though rising
        ([0.5, 0.4, 0.6, 0.5, 0.7, 0.6], 2, 6),
    ],
)
def test_it_ends_after_so_many_evaluations_without_a_higher_one(
    accuracies: List[float], patience: int, expected: int
) -> None:
    assert evaluations_made(accuracies, patience) == expected


def test_without_patience_it_never_ends() -> None:
    assert not Plateau(0.5, 10**6).outlasts(None)


def test_it_passes_through_json_as_checkpoints_do() -> None:
    plateau = Plateau().after(1 / 3).after(0.1)
    saved = json.loads(json.dumps(plateau))
    assert is_plateau(saved) and Plateau(*saved) == plateau


@pytest.mark.parametrize("value", [3, {}, [], [0.5], [0.5, -1], [0.5, 1.0], ["a", 1], [0.5, True]])
def test_what_is_no_plateau_is_recognised(value: Any) -> None:
    assert not is_plateau(value)

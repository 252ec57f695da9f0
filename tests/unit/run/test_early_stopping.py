"""When a run whose test accuracy no longer rises ends."""

from __future__ import annotations

import json
from typing import Any, List

import pytest

from trainer.checkpoint.state import is_plateau
from trainer.run.outcome import Plateau


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


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_the_learning_rate_is_reduced_after_so_many_and_after_as_many_again(patience: int) -> None:
    accuracies = [0.5, 0.4, 0.5, 0.3, 0.6, 0.6, 0.1, 0.2, 0.2, 0.2, 0.7]
    plateau, found = Plateau(), []
    best, waited, reductions, expected = -1.0, 0, 0, []
    for accuracy in accuracies:
        plateau = plateau.after(accuracy, patience)
        found.append(plateau.reductions)
        waited = 0 if accuracy > best else waited + 1  # as PyTorch's ReduceLROnPlateau counts
        best = max(best, accuracy)
        if waited == patience:
            waited, reductions = 0, reductions + 1
        expected.append(reductions)
    assert found == expected and found[-1] > 0


def test_without_patience_it_never_ends() -> None:
    assert not Plateau(0.5, 10**6).outlasts(None)


def test_it_passes_through_json_as_checkpoints_do() -> None:
    plateau = Plateau().after(1 / 3).after(0.1, 1)
    saved = json.loads(json.dumps(plateau))
    assert is_plateau(saved) and Plateau(*saved) == plateau == (1 / 3, 1, 1)
    assert is_plateau(saved[:2])  # as older checkpoints have it


@pytest.mark.parametrize("value", [3, {}, [], [0.5], [0.5, -1], [0.5, 1.0], ["a", 1], [0.5, True]])
def test_what_is_no_plateau_is_recognised(value: Any) -> None:
    assert not is_plateau(value)

"""Early stopping: when a run whose test accuracy no longer rises should end."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional


class Plateau(NamedTuple):
    """What early stopping has to remember of a run; it is saved in every checkpoint."""

    best_accuracy: float = -1.0  # the highest so far; below any before the first evaluation
    evaluations: int = 0  # in a row since then

    def after(self, accuracy: float) -> Plateau:
        """After one more evaluation."""
        if accuracy > self.best_accuracy:
            return Plateau(accuracy, 0)
        return Plateau(self.best_accuracy, self.evaluations + 1)

    def outlasts(self, patience: Optional[int]) -> bool:
        """Whether ``train.patience`` is exhausted; never where it is None."""
        return patience is not None and self.evaluations >= patience


def is_saved_plateau(value: Any) -> bool:
    """Whether ``value``, read from JSON, is a :class:`Plateau`."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    accuracy, evaluations = value
    return type(accuracy) is float and type(evaluations) is int and 0 <= evaluations < 2**53

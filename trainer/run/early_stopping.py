"""Early stopping: when a run whose test accuracy no longer rises should end."""

from __future__ import annotations

from typing import NamedTuple, Optional


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

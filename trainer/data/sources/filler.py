"""What makes batches of a set, whatever its samples are."""

from __future__ import annotations

import abc
from typing import Sequence, Tuple

import numpy as np


class Filler(abc.ABC):
    """Makes batches of a source's samples: read, augmented and normalised."""

    shape: Tuple[int, int, int]  # (channels, height, width) of a sample

    @abc.abstractmethod
    def __call__(
        self, rows: np.ndarray, epoch: int, data: np.ndarray, label: np.ndarray
    ) -> Sequence[int]:
        """Write the samples ``rows`` of an epoch; what is random is drawn from (epoch, row).

        Args:
            rows: indices of B samples.
            data: float32 (B, *self.shape), to be written.
            label: float32 (B,), to be written.

        Returns:
            The positions in ``rows`` of samples that could not be read, where ``data.bad_samples``
            is ``skip``: in training others stand in their place, in evaluation nothing does.

        Raises:
            BadSampleError: one of them cannot be read, and ``data.bad_samples`` is ``stop``.
        """

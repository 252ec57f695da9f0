"""What makes batches of a set, whatever its samples are."""

from __future__ import annotations

import abc
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple, TypeVar

import numpy as np

from ...config import Data
from ...console import warn
from ..idx_file import BadSampleError
from ..transform import PixelTransform, planes_shape

_NAMED = 10  # bad samples that are named one by one
_MOST_IN_A_ROW = 100  # that are skipped

Sample = TypeVar("Sample")


class Filler(abc.ABC):
    """Makes batches of a source's samples: read, augmented and normalised."""

    shape: Tuple[int, int, int]  # (channels, height, width) of a sample

    @abc.abstractmethod
    def __call__(
        self, rows: np.ndarray, epoch: int, data: np.ndarray, label: np.ndarray
    ) -> Sequence[int]:
        """Write the samples ``rows`` of an epoch; what is random is drawn from (epoch, row).

        BadSampleError names one that cannot be read, where ``data.bad_samples`` is ``stop``.

        Args:
            rows: indices of B samples.
            data: float32 (B, *self.shape), to be written.
            label: float32 (B,), to be written.

        Returns:
            The positions in ``rows`` of samples that could not be read, where ``data.bad_samples``
            is ``skip``: in training others stand in their place, in evaluation nothing does.
        """


class ReadingFiller(Filler):
    """Of a set whose samples are read when they are needed, and may turn out bad."""

    def __init__(self, source: Any, settings: Data, seed: int, training: bool):
        self._source, self._settings = source, settings
        self._seed, self._training = seed, training
        self._pixels = PixelTransform(planes_shape(source.image_shape), settings, seed, training)
        self.shape = self._pixels.shape

    def _usable(self, row: int, read: Callable[[int], Sample]) -> Tuple[Optional[Sample], bool]:
        """What ``read`` gives of the sample ``row``, and True; or of a bad one's next, and False.

        In evaluation nothing stands in the place of a bad one.
        """
        for offset in range(_MOST_IN_A_ROW):
            index = (row + offset) % len(self._source)
            try:
                return read(index), not offset
            except BadSampleError as error:
                if self._settings.bad_samples != "skip":
                    raise
                self._source.skipped.tell(index, error)
                if not self._training:
                    return None, False
        raise BadSampleError(
            f"{_MOST_IN_A_ROW} samples in a row cannot be read, from {self._source.name(row)} on; "
            "data.bad_samples=skip is for single ones"
        )


class Skipped:
    """The bad samples of a set that were found so far, by this rank."""

    def __init__(self) -> None:
        self._found: Dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[int]:
        return iter(self._found)

    def tell(self, index: int, error: Exception) -> None:
        """Count a sample, and name it the first time."""
        if index in self._found:
            return
        self._found[index] = str(error)
        if len(self._found) <= _NAMED:
            end = "; others are not named" if len(self._found) == _NAMED else ""
            warn(f"skipped ({len(self._found)} so far on this rank): {error}{end}")

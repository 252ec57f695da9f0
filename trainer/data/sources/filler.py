"""What makes batches of a set, whatever its samples are."""

from __future__ import annotations

import abc
from typing import Any, Callable, List, Sequence, Set, Tuple

import numpy as np

from ...config import Data
from ...console import warn
from ..idx_file import BadSampleError
from ..transform import PixelTransform, planes, planes_shape

_NAMED = 10  # bad samples that are named one by one
_MOST_IN_A_ROW = 100  # that are skipped

Sample = Tuple[np.ndarray, Any]  # image, uint8 (H, W) or (H, W, C), and label


class Filler(abc.ABC):
    """Makes batches of a source's samples: read, augmented from ``seed`` and normalised."""

    def __init__(self, source: Any, settings: Data, seed: int, training: bool):
        self._source, self._settings = source, settings
        self._seed, self._training = seed, training
        self._pixels = PixelTransform(planes_shape(source.image_shape), settings, seed, training)
        #: (channels, height, width) of a sample.
        self.shape = self._pixels.shape

    @abc.abstractmethod
    def __call__(
        self, rows: np.ndarray, epoch: int, data: np.ndarray, label: np.ndarray
    ) -> Sequence[int]:
        """Write the B samples ``rows`` of an epoch; what is random is drawn from (epoch, row).

        They go to ``data``, float32 (B, *self.shape), and ``label``, float32 (B,). BadSampleError
        names one that cannot be read, where ``data.bad_samples`` is ``stop``. Where it is ``skip``,
        the positions in ``rows`` of such are returned: in training others stand in their place, in
        evaluation nothing does.
        """


class ReadingFiller(Filler):
    """Of a set whose samples are read when they are needed, and may turn out bad."""

    def _write(
        self,
        rows: np.ndarray,
        epoch: int,
        read: Callable[[int, int], Sample],
        data: np.ndarray,
        label: np.ndarray,
    ) -> List[int]:
        """Write samples, which ``read`` gives of a position in ``rows`` and an index of the source.

        Returns the positions of bad ones. In training each has the next good one in its place.
        """
        pixels = np.zeros((len(rows), *planes_shape(self._source.image_shape)), np.uint8)
        bad = []
        for position, row in enumerate(rows.tolist()):
            for offset in range(_MOST_IN_A_ROW):
                index = (row + offset) % len(self._source)
                try:
                    image, label[position] = read(position, index)
                except BadSampleError as error:
                    if self._settings.bad_samples != "skip":
                        raise
                    self._source.skipped.tell(index, error)
                    bad += [] if offset else [position]
                    if not self._training:
                        break
                else:
                    pixels[position] = planes(image[None])[0]
                    break
            else:
                raise BadSampleError(
                    f"{_MOST_IN_A_ROW} samples in a row cannot be read, from "
                    f"{self._source.name(row)} on; data.bad_samples=skip is for single ones"
                )
        self._pixels(pixels, rows, epoch, data)
        return bad


class Skipped(Set[int]):
    """The bad samples of a set that were found so far, by this rank."""

    def tell(self, index: int, error: Exception) -> None:
        """Count a sample, and name it the first time."""
        if index in self:
            return
        self.add(index)
        if len(self) <= _NAMED:
            end = "; others are not named" if len(self) == _NAMED else ""
            warn(f"skipped ({len(self)} so far on this rank): {error}{end}")

"""Batches of encoded pictures, decoded and augmented by threads.

Threads, not processes: decoding and resizing let other threads run, and batches need no copying
between processes. Each thread takes a few samples at a time and writes them into the batch; what
it computes depends on the sample alone, so the number of threads changes nothing.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Dict, List, Optional, Sequence, Tuple

import numpy as np

from ...config import Data
from ...console import warn
from .. import sharding
from ..idx_file import BadSampleError
from ..sources.filler import Filler
from ..transform import DRAWS as PIXEL_DRAWS
from ..transform import PixelTransform, planes, planes_shape
from . import crop

if TYPE_CHECKING:
    from ..sources.pictures import Pictures

_TOGETHER = 4  # samples that a thread takes at a time
_NAMED = 10  # bad samples that are named one by one


class PictureBatches(Filler):
    """Makes batches of pictures."""

    def __init__(self, source: Pictures, settings: Data, seed: int, training: bool):
        self._source, self._settings = source, settings
        self._seed, self._training = seed, training
        shape = planes_shape(source.image_shape)
        self._pixels = PixelTransform(shape, settings, seed, training)
        self.shape = self._pixels.shape
        self._skips = settings.bad_samples == "skip"

    def __call__(
        self, rows: np.ndarray, epoch: int, data: np.ndarray, label: np.ndarray
    ) -> Sequence[int]:
        draws = np.empty((len(rows), 0))
        if self._training:
            count = PIXEL_DRAWS + crop.DRAWS
            draws = sharding.uniform(self._seed, epoch, rows, count)[:, PIXEL_DRAWS:]

        def fill(start: int) -> List[int]:
            part = slice(start, start + _TOGETHER)
            return [
                start + position
                for position in self._fill(rows[part], draws[part], epoch, data[part], label[part])
            ]

        pool, starts = self._source.pool(self._settings), range(0, len(rows), _TOGETHER)
        if pool is None:
            return [position for start in starts for position in fill(start)]
        parts = [pool.submit(fill, start) for start in starts]
        wait(parts)  # also if one fails: the others write into memory of the caller
        return [position for part in parts for position in part.result()]

    def _fill(
        self,
        rows: np.ndarray,
        draws: np.ndarray,
        epoch: int,
        data: np.ndarray,
        label: np.ndarray,
    ) -> List[int]:
        """Write some samples of a batch; returns the positions of bad ones."""
        pixels = np.zeros((len(rows), *self.shape), np.uint8)
        bad = []
        for position, row in enumerate(rows):
            image, label[position], readable = self._sample(int(row), draws[position])
            if not readable:
                bad.append(position)
            if image is not None:
                np.copyto(pixels[position], planes(image[None])[0])
        self._pixels(pixels, rows, epoch, data)
        return bad

    def _sample(self, row: int, draw: np.ndarray) -> Tuple[Optional[np.ndarray], int, bool]:
        """(pixels, class, whether they are those of ``row``)."""
        numbers = draw.tolist()
        for offset in range(Skipped.MOST_IN_A_ROW):
            index = (row + offset) % len(self._source)
            try:
                content, label = self._source.read(index)
                return self._cut(index, content, numbers), label, not offset
            except BadSampleError as error:
                if not self._skips:
                    raise
                self._source.skipped.tell(index, error)
                if not self._training:
                    return None, 0, False
        raise Skipped.too_many(self._source.name(row))

    def _cut(self, index: int, content: bytes, draw: Sequence[float]) -> np.ndarray:
        try:
            return crop.cut(content, self._settings, draw)
        except crop.decode.UnreadableError as error:
            raise BadSampleError(
                f"{self._source.name(index)} is a bad picture: {error}; mend or remove it, or set "
                "data.bad_samples=skip"
            ) from None


class Skipped:
    """The bad samples of a set that were found so far, by this rank."""

    MOST_IN_A_ROW = 100

    def __init__(self) -> None:
        self._found: Dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._found)

    def tell(self, index: int, error: Exception) -> None:
        """Count a sample, and name it the first time."""
        if index in self._found:
            return
        self._found[index] = str(error)
        if len(self._found) <= _NAMED:
            end = "; others are not named" if len(self._found) == _NAMED else ""
            warn(f"skipped ({len(self._found)} so far on this rank): {error}{end}")

    @classmethod
    def too_many(cls, name: str) -> BadSampleError:
        """The error where so many follow each other, from the sample ``name`` on."""
        return BadSampleError(
            f"{cls.MOST_IN_A_ROW} samples in a row cannot be read, from {name} on; "
            "data.bad_samples=skip is for single ones"
        )


def threads(settings: Data) -> int:
    """Threads that decode: ``data.workers``, or as many as the rank has cores."""
    return len(os.sched_getaffinity(0)) if settings.workers is None else settings.workers


def make_pool(settings: Data) -> Optional[ThreadPoolExecutor]:
    """A pool of these threads; None where there are none."""
    count = threads(settings)
    return ThreadPoolExecutor(count, thread_name_prefix="decode") if count else None

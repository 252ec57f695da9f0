"""Sets of encoded pictures: what folders and record files have in common.

Threads decode and augment batches, not processes: decoding and resizing let other threads run, and
batches need no copying between processes. Each thread takes a few samples at a time and writes them
into the batch; what it computes depends on the sample alone, so the number of threads changes
nothing.
"""

from __future__ import annotations

import abc
import contextlib
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Callable, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from ...config import Data
from ...dist.device import cores
from .. import sharding
from ..idx_file import BadSampleError
from ..pictures import crop
from ..transform import DRAWS as PIXEL_DRAWS
from .base import Source, probes
from .filler import ReadingFiller, Skipped

_TOGETHER = 4  # samples that a thread takes at a time


class _PictureBatches(ReadingFiller):
    """Makes batches of pictures."""

    def __call__(
        self, rows: np.ndarray, epoch: int, data: np.ndarray, label: np.ndarray
    ) -> Sequence[int]:
        draws = np.empty((len(rows), 0))
        if self._training:
            count = PIXEL_DRAWS + crop.DRAWS
            draws = sharding.uniform(self._seed, epoch, rows, count)[:, PIXEL_DRAWS:]

        def fill(start: int) -> List[int]:
            part = slice(start, start + _TOGETHER)

            def read(position: int, index: int) -> Tuple[np.ndarray, int]:
                return self._sample(draws[start + position].tolist(), index)

            bad = self._write(rows[part], epoch, read, data[part], label[part])
            return [start + position for position in bad]

        pool, starts = self._source.pool(self._settings), range(0, len(rows), _TOGETHER)
        if pool is None:
            return [position for start in starts for position in fill(start)]
        parts = [pool.submit(fill, start) for start in starts]
        wait(parts)  # also if one fails: the others write into memory of the caller
        return [position for part in parts for position in part.result()]

    def _sample(self, draw: Sequence[float], index: int) -> Tuple[np.ndarray, int]:
        content, label = self._source.read(index)
        try:
            return crop.cut(content, self._settings, draw), label
        except crop.decode.UnreadableError as error:
            raise BadSampleError(
                f"{self._source.name(index)} is a bad picture: {error}; mend or remove it, or set "
                "data.bad_samples=skip"
            ) from None


@dataclass(eq=False)
class Pictures(Source):
    """Encoded pictures, read when needed and brought to the size and channels of the settings."""

    settings: Data

    batches = _PictureBatches

    def __post_init__(self) -> None:
        self._pool: Optional[ThreadPoolExecutor] = None
        self.skipped = Skipped()

    @property
    def image_shape(self) -> Tuple[int, ...]:
        """(side, side, 3) in colour, (side, side) in grey."""
        side = self.settings.image_size
        assert side is not None  # checked by the settings
        return (side, side, 3) if self.settings.channels == 3 else (side, side)

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """The file, or the file and the number of the record."""

    @abc.abstractmethod
    def read(self, index: int) -> Tuple[bytes, int]:
        """The encoded picture of a sample, and its class. Any number of threads may call it.

        Raises BadSampleError where it cannot be read, or the net has no such class.
        """

    def _probed(self, read: Callable[[int], bytes]) -> List[bytes]:
        """The content of a few samples; nothing of those to be skipped."""
        found = []
        for index in probes(len(self)).tolist():
            found.append(b"")
            with self._to_be_skipped():
                found[-1] = read(index)
        return found

    @contextlib.contextmanager
    def _to_be_skipped(self) -> Iterator[None]:
        """Pass over a bad sample, where it will be: then it is told when it is trained on."""
        try:
            yield
        except BadSampleError:
            if self.settings.bad_samples == "stop":
                raise

    def pool(self, settings: Data) -> Optional[ThreadPoolExecutor]:
        """The threads that decode; started at first use. None: the caller does it."""
        if self._pool is None:
            count = threads(settings)
            self._pool = ThreadPoolExecutor(count, "decode") if count else None
        return self._pool

    def close(self) -> None:
        """End the threads."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()


def threads(settings: Data) -> int:
    """Threads that decode: ``data.workers``, or as many as the rank has cores."""
    return cores() if settings.workers is None else settings.workers

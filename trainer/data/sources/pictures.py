"""Sets of encoded pictures: what folders and record files have in common."""

from __future__ import annotations

import abc
from concurrent.futures import ThreadPoolExecutor
from typing import Optional, Tuple

from ...config import Data
from ..pictures.batches import PictureBatches, Skipped, make_pool
from .base import Filler, Source


class Pictures(Source):
    """Encoded pictures, read and decoded when they are needed.

    Args:
        settings: the size and the channels that pictures are brought to, and the threads.
    """

    def __init__(self, settings: Data):
        self._settings = settings
        self._pool: Optional[ThreadPoolExecutor] = None
        self.skipped = Skipped()

    @property
    def image_shape(self) -> Tuple[int, ...]:
        """(side, side, 3) in colour, (side, side) in grey."""
        side = self._settings.image_size
        assert side is not None  # checked by the settings
        return (side, side, 3) if self._settings.channels == 3 else (side, side)

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """The file, or the file and the number of the record."""

    @abc.abstractmethod
    def read(self, index: int) -> Tuple[bytes, int]:
        """The encoded picture of a sample, and its class. Any number of threads may call it.

        Raises:
            BadSampleError: it cannot be read, or the net has no such class.
        """

    def filler(self, settings: Data, seed: int, training: bool) -> Filler:
        """See :class:`Source`."""
        return PictureBatches(self, settings, seed, training)

    def pool(self, settings: Data) -> Optional[ThreadPoolExecutor]:
        """The threads that decode; started at first use. None: the caller does it."""
        if self._pool is None:
            self._pool = make_pool(settings)
        return self._pool

    def close(self) -> None:
        """End the threads."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

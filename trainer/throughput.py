"""Images a second, of the whole job, without warm-up and pauses."""

from __future__ import annotations

import time
from typing import Callable, Optional

# The first steps compile, allocate and connect.
WARMUP_STEPS = 5


class Throughput:
    """Counts images and the seconds in which they were trained on.

    Steps are handed to the device without waiting for it, so time is taken only where the host
    has just waited for all of them: :meth:`begin` and :meth:`end` are called at such places.

    Args:
        clock: seconds, rising.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._since: Optional[float] = None
        self._pending = 0
        self._window_images, self._window_seconds = 0, 0.0
        self._images, self._seconds = 0, 0.0

    def begin(self) -> None:
        """Training goes on from here; what was not timed before is left out."""
        self._since = self._clock()
        self._pending = 0

    def step(self, images: int) -> None:
        """A step over ``images``, of all ranks, was handed to the device."""
        self._pending += images

    def end(self) -> None:
        """The device has done all steps; what follows is not training, until :meth:`begin`."""
        if self._since is not None:
            self._window_images += self._pending
            self._window_seconds += self._clock() - self._since
        self._since = None

    def mark(self) -> None:
        """The device has done all steps so far, and training goes on."""
        if self._since is not None:
            self.end()
            self.begin()

    def read(self) -> Optional[float]:
        """Images a second since the last reading; None where nothing was timed."""
        images, seconds = self._window_images, self._window_seconds
        self._images, self._seconds = self._images + images, self._seconds + seconds
        self._window_images, self._window_seconds = 0, 0.0
        return images / seconds if seconds else None

    @property
    def overall(self) -> Optional[float]:
        """Images a second of all that was read; None where nothing was timed."""
        return self._images / self._seconds if self._seconds else None

"""Images a second over all ranks, without warm-up and pauses."""

from __future__ import annotations

import time
from typing import Callable, Optional

# The first steps compile graphs, allocate memory and connect ranks.
WARMUP_STEPS = 5


class Throughput:
    """Counts images and the time spent training on them.

    Steps are enqueued asynchronously, so the time is read only where the host has just waited for
    all of them: :meth:`begin`, :meth:`end` and :meth:`mark` must be called at such places.

    Args:
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._since: Optional[float] = None
        self._pending = 0
        self._window_images, self._window_seconds = 0, 0.0
        self._images, self._seconds = 0, 0.0

    def begin(self) -> None:
        """Start timing; images since the last :meth:`end` do not count."""
        self._since = self._clock()
        self._pending = 0

    def step(self, images: int) -> None:
        """Count a step over ``images``, of all ranks, that has been enqueued."""
        self._pending += images

    def end(self) -> None:
        """Stop timing, as all steps are complete; what follows is not training."""
        if self._since is not None:
            self._window_images += self._pending
            self._window_seconds += self._clock() - self._since
        self._since = None

    def mark(self) -> None:
        """Read the time, as all steps so far are complete, and continue timing."""
        if self._since is not None:
            self.end()
            self.begin()

    def read(self) -> Optional[float]:
        """Images a second since the last reading; None if nothing was timed."""
        images, seconds = self._window_images, self._window_seconds
        self._images, self._seconds = self._images + images, self._seconds + seconds
        self._window_images, self._window_seconds = 0, 0.0
        return images / seconds if seconds else None

    @property
    def overall(self) -> Optional[float]:
        """Images a second over all readings; None if nothing was timed."""
        return self._images / self._seconds if self._seconds else None

"""Times the parts of a step on each rank, on one step out of many.

That means waiting for the device between them, which costs the overlap of computation and
communication. It is done on the first step after a reading, when all ranks have just synchronised.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any, Callable, DefaultDict, Dict, List, Optional

import mxnet as mx
import numpy as np
import psutil

from .. import dist
from ..batch_norm.coefficients_native import seconds_of_sums

Mark = Callable[[str], None]  # called with the name of a part of the step where that part ends

# Where the time of a step goes, in this order. With several micro-batches forward and backward
# alternate. ``backward`` includes the loss; ``ranks`` is what the caller does before the allreduce.
PARTS = ("forward", "backward", "ranks", "allreduce", "update")


def unmarked(part: str) -> None:
    """The mark of a step that is not timed: does nothing."""


class StepClock:
    """Adds up ``seconds`` by part, and waits for the device where a part ends to tell them apart.

    ``sums`` are those of these spent in synced batch norm's sums: mostly waiting for peers.
    """

    def __init__(
        self,
        wait: Callable[[], Any] = mx.nd.waitall,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.seconds: DefaultDict[str, float] = defaultdict(float)
        self._wait, self._clock = wait, clock
        self._wait()
        self.sums, self._sums_before = 0.0, seconds_of_sums()
        self._since = clock()

    def mark(self, part: str) -> None:
        """End ``part``, which has been enqueued, by waiting for the device."""
        self._wait()
        now = self._clock()
        self.seconds[part] += now - self._since
        self.sums = seconds_of_sums() - self._sums_before
        self._since = now


class Timing:
    """The timed steps of a run: one of ``every`` (None: none), and none before ``first_step``."""

    def __init__(self, every: Optional[int], first_step: int):
        self._every, self._first = every, first_step
        self._timed: Optional[StepClock] = None

    def of(self, step: int) -> Mark:
        """The mark function for the step after ``step`` steps; see train_step."""
        if self._every is None or step % self._every or step < self._first:
            return unmarked
        self._timed = StepClock()
        return self._timed.mark

    def read(self) -> Dict[str, float]:
        """Metrics of the ranks' last timed steps, and of their memory, by tag; collective.

        ``compute_ms`` is forward and backward without synced batch norm's sums. The rank that
        arrives last at the allreduce does not wait, so the shortest allreduce approximates the
        communication itself, and the excess of the longest is waiting.
        """
        if self._every is None:
            return {}
        ranks = dist.world_size()
        table = np.zeros((ranks, 4))
        table[dist.rank()] = self._own()
        compute, sums, allreduce, memory = dist.allreduce_sum(table, "timing").T
        figures = {"system/memory_megabytes_largest_rank": memory.max() / 1e6}
        if np.isnan(compute).any():
            return figures
        figures["speed/compute_ms_slowest_rank"] = 1e3 * compute.max()
        if ranks > 1:
            figures["speed/compute_ms_fastest_rank"] = 1e3 * compute.min()
            figures["speed/slowest_rank"] = compute.argmax()
            figures["speed/spread_percent"] = 100 * (compute.max() / compute.min() - 1)
            figures["speed/allreduce_ms"] = 1e3 * allreduce.min()
            figures["speed/waiting_ms"] = 1e3 * np.ptp(allreduce)
        if sums.any():
            figures["speed/batch_norm_sums_ms"] = 1e3 * sums.min()
        return figures

    def _own(self) -> List[float]:
        """[compute, batch norm's sums, allreduce] in seconds, NaN if untimed; resident bytes."""
        timed, self._timed = self._timed, None
        memory = psutil.Process().memory_info().rss
        if timed is None:
            return [np.nan, np.nan, np.nan, memory]
        computing = timed.seconds["forward"] + timed.seconds["backward"]
        return [computing - timed.sums, timed.sums, timed.seconds["allreduce"], memory]


# The first steps compile graphs, allocate memory and connect ranks.
WARMUP_STEPS = 5


class Throughput:
    """Counts images and the time spent training on them.

    Steps are enqueued asynchronously, so the time is read only where the host has just waited for
    all of them: :meth:`begin`, :meth:`end` and :meth:`mark` must be called at such places.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._since: Optional[float] = None
        self._pending = 0
        self._window, self._all = np.zeros((2, 2))  # images, seconds

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
            self._window += self._pending, self._clock() - self._since
        self._since = None

    def mark(self) -> None:
        """Read the time, as all steps so far are complete, and continue timing."""
        if self._since is not None:
            self.end()
            self.begin()

    def read(self) -> Optional[float]:
        """Images a second since the last reading; None if nothing was timed."""
        window, self._window = self._window, np.zeros(2)
        self._all += window
        return _rate(window)

    @property
    def overall(self) -> Optional[float]:
        """Images a second over all readings; None if nothing was timed."""
        return _rate(self._all)


def _rate(counted: np.ndarray) -> Optional[float]:
    images, seconds = counted.tolist()
    return images / seconds if seconds else None

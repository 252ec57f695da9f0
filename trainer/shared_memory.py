"""Sums of vectors over the ranks of one node, through memory they share.

A collective of Horovod costs milliseconds however little it carries, and batch norm needs two for
each layer and step. Processes of one node can write their vectors side by side instead: some
microseconds, and a wait for the slowest. Gradients pass through the same memory piece by piece.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import platform
import secrets
import time
from typing import Any, Callable, Optional

import numpy as np

_CACHE_LINE = 8  # float64 or int64 numbers
_PATIENCE = 1.0  # seconds of waiting before looking whether the peers live
_LOOK_EVERY = 0.2


class SharedMemorySum:
    """Sums float64 vectors of up to ``capacity`` numbers over ``size`` processes of one node.

    Each process has two slots, used in turn, and a counter of its calls. A call fills a slot,
    raises the counter, waits for the others' counters and adds up the slots in the order of the
    ranks, so that all get the same bits. Nobody can overwrite a slot that is still read: to fill
    it again, a process must have seen all others enter the call in between.

    Only the caller's own calls are counted: every process must make them in the same order.

    Attributes:
        look: what a process that has waited long does, again and again: raises if it must not.
    """

    def __init__(self, path: str, capacity: int, index: int, size: int):
        self.index, self.size, self.capacity = index, size, capacity
        numbers = size * _CACHE_LINE + 2 * size * capacity
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        self._file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115 - kept for its lock
        os.posix_fallocate(descriptor, 0, 8 * numbers)  # want of memory shows here, not later
        memory = mmap.mmap(descriptor, 8 * numbers)
        counters = np.frombuffer(memory, np.int64, size * _CACHE_LINE)
        self._counters = counters[::_CACHE_LINE]
        slots = np.frombuffer(memory, np.float64, offset=counters.nbytes)
        self._slots = slots.reshape(2, size, capacity)
        # Held until this process ends, however it ends.
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, index)
        self.calls = 0
        self.look: Callable[[], None] = self.look_for_the_dead
        self._enter()

    def __reduce__(self) -> Any:
        """A copy in another process is None: the memory is these processes' alone."""
        return type(None), ()

    def fileno(self) -> int:
        """Of the file behind the memory, open as long as this lives."""
        return self._file.fileno()

    def all_entered(self) -> bool:
        """Whether every process is in the present call; after construction: has opened the file."""
        return bool((self._counters >= self.calls).all())

    def _enter(self) -> None:
        self.calls += 1
        self._counters[self.index] = self.calls

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """The sum over processes; blocks until all have called.

        Raises:
            RuntimeError: a process has ended without calling.
        """
        slot = self._slots[self.calls % 2, :, : values.size]
        slot[self.index] = values
        self._enter()
        self._wait()
        return slot.sum(axis=0)

    def add_up(self, values: np.ndarray) -> None:
        """Replace a float32 vector of any length by its sum over processes, a piece at a time.

        Raises:
            RuntimeError: a process has ended without calling.
        """
        piece = 2 * self._slots.shape[2]
        for start in range(0, values.size, piece):
            part = values[start : start + piece]
            slot = self._slots[self.calls % 2].view(np.float32)[:, : part.size]
            slot[self.index] = part
            self._enter()
            self._wait()
            np.add(slot[0], slot[1], out=part)
            for other in slot[2:]:
                part += other

    def _wait(self) -> None:
        start = looked = time.monotonic()
        pause = 0.0
        while not self.all_entered():
            time.sleep(pause)  # lets other threads run, even with 0
            now = time.monotonic()
            if now - start > 0.0005:
                pause = 0.0001
            if now - start > _PATIENCE and now - looked > _LOOK_EVERY:
                looked = now
                self.look()

    def look_for_the_dead(self) -> None:
        """Raise a RuntimeError if a process that has not entered the present call never will."""
        for peer in np.flatnonzero(self._counters < self.calls):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(peer))
            except OSError:
                continue  # its owner lives
            raise RuntimeError(f"process {peer} of {self.size} on this node ended before its turn")


def possible() -> bool:
    """Whether this processor shows its peers what it writes in the order in which it is written.

    Others may show the counter before the slot that it announces.
    """
    return platform.machine() in ("x86_64", "AMD64")


def connect(
    capacity: int,
    index: int,
    size: int,
    sum_over_ranks: Callable[[np.ndarray], np.ndarray],
    directory: str = "/dev/shm",
) -> Optional[SharedMemorySum]:
    """Meet the other processes; None, for all of them, if not all share this node's memory.

    The file's name goes as soon as all have opened it: nothing is left behind by any end.

    Args:
        index: of this process among ``size``, from 0.
        sum_over_ranks: another way to add up float64 vectors over the same processes.
    """
    token = secrets.randbelow(2**53) if index == 0 else 0
    token = int(sum_over_ranks(np.array([token], np.float64))[0])
    path = os.path.join(directory, f"ranks_{token:014x}")
    shared = None
    if possible():
        with contextlib.suppress(OSError):
            shared = SharedMemorySum(path, capacity, index, size)
    sum_over_ranks(np.zeros(1))  # from here on all have opened the file
    met = shared is not None and shared.all_entered()
    everyone_met = sum_over_ranks(np.array([met], np.float64))[0] == size
    with contextlib.suppress(OSError):  # another was first, or there is none to remove
        os.unlink(path)
    return shared if everyone_met else None

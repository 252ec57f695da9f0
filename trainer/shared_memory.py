"""Sums of vectors over the ranks of one node, through memory they share.

A collective of Horovod costs milliseconds however little it carries, and batch norm needs two for
each layer and step. Processes of one node can write their vectors side by side instead: some
microseconds, and a wait for the slowest.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import platform
import secrets
import time
from collections import Counter
from typing import Any, Callable, ClassVar, Optional, Tuple

import numpy as np
import psutil

_CACHE_LINE = 8  # float64 or int64 numbers
_PATIENCE = 1.0  # seconds of waiting before looking whether the peers live
_LOOK_EVERY = 0.2


class SharedMemorySum:
    """Sums vectors of up to ``capacity`` numbers of 8 bytes over ``size`` processes of one node.

    Each process has two slots, used in turn, and a counter of its calls. A call fills a slot,
    raises the counter, waits for the others' counters and adds up the slots in the order of the
    ranks, so that all get the same bits. Nobody can overwrite a slot that is still read: to fill
    it again, a process must have seen all others enter the call in between.

    Only the caller's own calls are counted: every process must make them in the same order.

    Attributes:
        lost: the process that this one has waited for in vain, and why; of all sums. An operator's
            error does not tell it, as MXNet has words of its own.
    """

    lost: ClassVar[Optional[str]] = None

    def __init__(self, descriptor: int, capacity: int, index: int, size: int):
        """Take the file behind ``descriptor``, of which this process must have no other.

        To close another would give up the lock below.
        """
        self.index, self.size, self.capacity = index, size, capacity
        numbers = size * _CACHE_LINE + 2 * size * capacity
        self._file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115 - kept for its lock
        os.posix_fallocate(descriptor, 0, 8 * numbers)  # want of memory shows here, not later
        memory = mmap.mmap(descriptor, 8 * numbers)
        counters = np.frombuffer(memory, np.int64, size * _CACHE_LINE)
        self._counters, self._pids = counters[::_CACHE_LINE], counters[1::_CACHE_LINE]
        self._pids[index] = os.getpid()
        slots = np.frombuffer(memory, np.float64, offset=counters.nbytes)
        self._slots = slots.reshape(2, size, capacity)
        # Held until this process ends, however it ends.
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, index)
        self.calls = 0
        self._seen_stopped: Counter[Tuple[int, int]] = Counter()  # by process and call
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
        """The sum over processes, of float64 or int64; blocks until all have called.

        Raises:
            RuntimeError: a process has ended, or been stopped, without calling.
        """
        slot = self._slots[self.calls % 2].view(values.dtype)[:, : values.size]
        slot[self.index] = values
        self.meet()
        return slot.sum(axis=0)

    def meet(self) -> None:
        """Wait until all have called.

        Raises:
            RuntimeError: a process has ended, or been stopped, without calling.
        """
        self._enter()
        self._wait()

    def _wait(self) -> None:
        start = looked = time.monotonic()
        waited = 0.0
        while not self.all_entered():
            # Lets other threads run, even with 0; then a hundredth more, from 0.1 ms to 5.
            time.sleep(0 if waited < 0.0005 else min(max(waited / 100, 0.0001), 0.005))
            now = time.monotonic()
            waited = now - start
            if waited > _PATIENCE and now - looked > _LOOK_EVERY:
                looked = now
                self.look_for_the_dead()

    def look_for_the_dead(self) -> None:
        """Raise a RuntimeError if a process that has not entered the present call never will.

        One that a signal has stopped is given as long as Horovod would give it.
        """
        for peer in map(int, np.flatnonzero(self._counters < self.calls)):
            fate = self._fate(peer)
            if fate is not None:
                SharedMemorySum.lost = f"process {peer} of {self.size} on this node {fate}"
                raise RuntimeError(self.lost)

    def _fate(self, peer: int) -> Optional[str]:
        if self._has_ended(peer):
            return "ended before its turn"
        if _is_stopped(self._pids[peer]):
            self._seen_stopped[peer, self.calls] += 1
            seconds = self._seen_stopped[peer, self.calls] * _LOOK_EVERY
            if seconds > float(os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS", 30)):
                return f"has been stopped for {seconds:.0f} s"
        return None

    def _has_ended(self, peer: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, peer)
        except OSError:
            return False  # its owner lives
        return True


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False  # of another container, or gone


def possible() -> bool:
    """Whether processes of this machine can share memory in this way.

    Others than these processors may show the counter before the slot that it announces.
    """
    return platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create")


def _open_file(
    index: int, sum_over_ranks: Callable[[np.ndarray], np.ndarray], proc: str
) -> Optional[int]:
    """A descriptor of a new file in memory that process 0 makes; None if this one cannot see it.

    It needs no /dev/shm, of which containers are given little. It has no name that could be left
    behind: the others open it through process 0's descriptor, which must stay until they have.
    """
    token, own, pid = 0, -1, 0
    if index == 0 and possible():
        token, pid = secrets.randbelow(2**53), os.getpid()
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            own = os.memfd_create(f"ranks_{token:x}")
    told = np.array([token, own if index == 0 else 0, pid], np.float64)
    token, number, pid = map(int, sum_over_ranks(told))
    if index == 0:
        return None if own < 0 else own
    path = f"{proc}/{pid}/fd/{number}"
    with contextlib.suppress(OSError):
        # A process in a container of its own may find another file by this path.
        if os.readlink(path) == f"/memfd:ranks_{token:x} (deleted)":
            return os.open(path, os.O_RDWR)
    return None


def open_together(
    size: int,
    index: int,
    processes: int,
    sum_over_ranks: Callable[[np.ndarray], np.ndarray],
    proc: str = "/proc",
) -> Optional[mmap.mmap]:
    """``size`` bytes of memory, all 0, that all ``processes`` see; None, for all, if not all do."""
    descriptor = _open_file(index, sum_over_ranks, proc)
    memory = None
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.posix_fallocate(descriptor, 0, size)
            memory = mmap.mmap(descriptor, size)
    opened = sum_over_ranks(np.array([memory is not None], np.float64))[0]
    if descriptor is not None:
        os.close(descriptor)
    return memory if opened == processes else None


def connect(
    capacity: int,
    index: int,
    size: int,
    sum_over_ranks: Callable[[np.ndarray], np.ndarray],
    proc: str = "/proc",
) -> Optional[SharedMemorySum]:
    """Meet the other processes; None, for all of them, if not all share this node's memory.

    Args:
        index: of this process among ``size``, from 0.
        sum_over_ranks: another way to add up float64 vectors over the same processes.
        proc: where processes are seen.
    """
    descriptor = _open_file(index, sum_over_ranks, proc)
    shared = None
    if descriptor is not None:
        with contextlib.suppress(OSError):
            shared = SharedMemorySum(descriptor, capacity, index, size)
    opened = sum_over_ranks(np.array([shared is not None], np.float64))[0]
    return shared if shared is not None and opened == size else None

"""Allreduce of small vectors, and broadcast, between the ranks of one node, in shared memory.

A Horovod collective costs milliseconds however small it is, and synced batch norm needs two per
layer and step. Through shared memory one takes microseconds, plus the wait for the slowest rank.
Sums go on to other nodes through the channel of their leaders (channel.py).
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
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional, Tuple

import numpy as np
import psutil

from . import environment

if TYPE_CHECKING:
    from .channel import Channel

_CACHE_LINE = 8  # float64 or int64 numbers
_PATIENCE = 1.0  # seconds of waiting before checking that the peers are alive
_LOOK_EVERY = 0.2  # seconds between checks
_LOST, _MISMATCH = 1, 2  # why there is no sum over nodes: Outcome in native/channel.h


class Beyond(NamedTuple):
    """The way to the other nodes, of sums over the ranks of several."""

    channel: Optional[Channel]  # of the leader: process 0 of its node
    stream: int


class LostPeerError(RuntimeError):
    """A process or node has ended, or been stopped, without calling; which, and why."""


class SharedMemorySum:
    """Sums vectors of up to ``capacity`` 8-byte numbers over ``size`` processes of one node.

    Each process has two slots, used in turn, and a counter of its calls. A call fills a slot,
    increments the counter, waits for the peers' counters and sums the slots in rank order, so that
    every process gets the same bits. No slot is overwritten while a peer still reads it: before a
    process fills it again, it has seen all peers enter the call in between.

    With ``beyond`` the sum is that over several nodes. The leader increments its counter when the
    sum over all nodes is in its slot, and the others wait for that. If there will be none, its
    counter says so.

    Calls are matched by their number: every process must make them in the same order.
    """

    def __init__(
        self,
        descriptor: int,
        capacity: int,
        index: int,
        size: int,
        beyond: Optional[Beyond] = None,
    ):
        """Take over ``descriptor``; the process must hold no other one of the same file.

        Closing another descriptor of it would release the POSIX lock taken below.
        """
        self.index, self.size, self.capacity, self.beyond = index, size, capacity, beyond
        numbers = size * _CACHE_LINE + 2 * size * capacity
        self._file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115 - kept for its lock
        os.posix_fallocate(
            descriptor, 0, 8 * numbers
        )  # fails here, not later, where memory is short
        memory = mmap.mmap(descriptor, 8 * numbers)
        counters = np.frombuffer(memory, np.int64, size * _CACHE_LINE)
        self._counters, self._pids = counters[::_CACHE_LINE], counters[1::_CACHE_LINE]
        self._pids[index] = os.getpid()
        slots = np.frombuffer(memory, np.float64, offset=counters.nbytes)
        self._slots = slots.reshape(2, size, capacity)
        # Held until this process dies, however it dies: see _has_ended.
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, index)
        self.calls = 0
        self._seen_stopped: Counter[Tuple[int, int]] = Counter()  # by process and call
        self._enter()

    def fileno(self) -> int:
        """The descriptor of the shared file, open for the lifetime of this object."""
        return self._file.fileno()

    def all_entered(self) -> bool:
        """Whether every process has entered the current call (at first: has connected)."""
        return self._entered(slice(None))

    def _entered(self, processes: slice) -> bool:
        return bool((self._counters[processes] >= self.calls).all())

    def _enter(self) -> None:
        self.calls += 1
        self._counters[self.index] = self.calls

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """The sum over processes of ``values``, float64 or int64; blocks until all have called.

        Raises:
            LostPeerError: a process has ended, or been stopped, without calling.
            RuntimeError: the nodes differ in how many numbers they add up.
        """
        slot = self._slots[self.calls % 2].view(values.dtype)[:, : values.size]
        slot[self.index] = values
        if self.beyond is None:
            self.barrier()
            return slot.sum(axis=0)
        if self.beyond.channel is not None:
            return self._lead(slot, self.beyond.channel, self.beyond.stream)
        self._enter()
        self._wait(slice(0, 1))
        return slot[0].copy()

    def _lead(self, slot: np.ndarray, channel: Channel, stream: int) -> np.ndarray:
        self.calls += 1
        try:
            self._wait(slice(1, None))
        except LostPeerError:
            self._counters[0] = -_LOST
            channel.abandon()
            raise
        total = slot.sum(axis=0)
        outcome = channel.sum(stream, self.calls, total)
        if outcome:
            self._counters[0] = -outcome
            self.check_peers()
        slot[0] = total
        self._counters[0] = self.calls
        return total

    def broadcast(self, values: np.ndarray) -> None:
        """Overwrite ``values``, contiguous and alike everywhere, with those of process 0.

        A call for each ``8 * capacity`` bytes, in slots that alternate as those of sums do.

        Raises:
            LostPeerError: a process has ended, or been stopped, without calling.
        """
        remaining = values.reshape(-1).view(np.uint8)
        while remaining.size:
            slot = self._slots[self.calls % 2, 0].view(np.uint8)[: remaining.size]
            part, remaining = remaining[: slot.size], remaining[slot.size :]
            if self.index == 0:
                slot[:] = part
            self.barrier()
            if self.index != 0:
                part[:] = slot

    def barrier(self) -> None:
        """Wait until all have called.

        Raises:
            LostPeerError: a process has ended, or been stopped, without calling.
        """
        self._enter()
        self._wait(slice(None))

    def _wait(self, processes: slice) -> None:
        start = looked = time.monotonic()
        waited = 0.0
        while not self._entered(processes):
            # Yield at first, then back off: 1 % of the time waited so far, 0.1 to 5 ms.
            time.sleep(0 if waited < 0.0005 else min(max(waited / 100, 0.0001), 0.005))
            now = time.monotonic()
            waited = now - start
            if waited > _PATIENCE and now - looked > _LOOK_EVERY:
                looked = now
                self.check_peers()

    def check_peers(self) -> None:
        """Raise a LostPeerError if the current call will never end.

        A peer that is stopped by a signal gets as long as Horovod would give it.
        """
        if self._counters[0] == -_MISMATCH:
            raise RuntimeError("the nodes differ in what they add up")
        if self._counters[0] == -_LOST:
            channel = self.beyond and self.beyond.channel
            lost = channel.lost() if channel else "this node's first rank lost another"
            raise LostPeerError(lost)
        for peer in map(int, np.flatnonzero(self._counters < self.calls)):
            fate = None if peer == self.index else self._fate(peer)
            # Who has entered since then may well have ended.
            if fate is not None and self._counters[peer] < self.calls:
                raise LostPeerError(f"process {peer} of {self.size} on this node {fate}")

    def _fate(self, peer: int) -> Optional[str]:
        if self._has_ended(peer):
            return "ended before its turn"
        if _is_stopped(self._pids[peer]):
            self._seen_stopped[peer, self.calls] += 1
            seconds = self._seen_stopped[peer, self.calls] * _LOOK_EVERY
            if seconds > environment.patience():
                return f"has been stopped for {seconds:.0f} s"
        return None

    def _has_ended(self, peer: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, peer)
        except OSError:
            return False  # its owner is alive
        return True


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except (psutil.Error, OSError):
        return False  # in another container, or gone; or /proc cannot be read now


def possible() -> bool:
    """Whether processes of this machine can share memory in this way.

    It relies on x86's total store order: elsewhere a counter could become visible before its slot.
    """
    return platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create")


def _open_file(
    index: int, sum_over_ranks: Callable[[np.ndarray], np.ndarray], proc: str
) -> Optional[int]:
    """A descriptor of a memory file that process 0 creates; None where this process cannot open it.

    Unlike /dev/shm, a memfd is not limited by the container and leaves no file behind. The peers
    open it through /proc/PID/fd, so process 0 must keep its descriptor until they have.
    """
    token, own, pid = 0, -1, 0
    if index == 0 and possible():
        token, pid = secrets.randbelow(2**53), os.getpid()
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            own = os.memfd_create(f"ranks_{token:x}")
    shared = np.array([token, own if index == 0 else 0, pid], np.float64)
    token, number, pid = map(int, sum_over_ranks(shared))
    if index == 0:
        return None if own < 0 else own
    path = f"{proc}/{pid}/fd/{number}"
    with contextlib.suppress(OSError):
        # In another PID namespace the path may lead to some other file.
        if os.readlink(path) == f"/memfd:ranks_{token:x} (deleted)":
            return os.open(path, os.O_RDWR)
    return None


def open_shared(
    size: int,
    index: int,
    processes: int,
    sum_over_ranks: Callable[[np.ndarray], np.ndarray],
    proc: str = "/proc",
) -> Optional[mmap.mmap]:
    """``size`` zeroed bytes shared by all ``processes``; None on all unless all have access."""
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
    beyond: Optional[Beyond] = None,
) -> Optional[SharedMemorySum]:
    """Connect to the peers; None on all of them unless all share this node's memory.

    Args:
        capacity: the most numbers in a vector.
        index: of this process among ``size``, from 0.
        sum_over_ranks: another allreduce of float64 vectors over the same processes.
        proc: where procfs is mounted.
        beyond: where the sums are over the processes of several nodes.
    """
    descriptor = _open_file(index, sum_over_ranks, proc)
    shared = None
    if descriptor is not None:
        with contextlib.suppress(OSError):
            shared = SharedMemorySum(descriptor, capacity, index, size, beyond)
    opened = sum_over_ranks(np.array([shared is not None], np.float64))[0]
    return shared if shared is not None and opened == size else None

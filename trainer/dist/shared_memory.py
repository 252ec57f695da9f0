"""Allreduce of small vectors, and broadcast, between the ranks of one node, in shared memory.

A Horovod collective costs milliseconds however small it is, and synced batch norm needs two per
layer and step. Through shared memory one takes microseconds, plus the wait for the slowest rank.
Sums go on to other nodes through the channel of their leaders (channel.py).
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import mmap
import os
import platform
import secrets
import socket
import struct
import time
from collections import Counter
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional, Tuple, TypeVar

import numpy as np
import psutil

from . import environment

if TYPE_CHECKING:
    from .channel import Channel

_CACHE_LINE = 8  # float64 or int64 numbers
_PATIENCE = 1.0  # seconds of waiting before checking that the peers are alive
_LOOK_EVERY = 0.2  # seconds between checks
_ONE_FILE = socket.CMSG_LEN(array.array("i").itemsize)
_MOST = 1024  # connections that wait for their turn
Sum = Callable[[np.ndarray], np.ndarray]
T = TypeVar("T")
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
        self, descriptor: int, capacity: int, index: int, size: int, beyond: Optional[Beyond] = None
    ):
        """Take over ``descriptor``; closing another one of the same file would release the lock."""
        self.index, self.size, self.capacity, self.beyond = index, size, capacity, beyond
        numbers = size * _CACHE_LINE + 2 * size * capacity
        self._file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115 - kept for its lock
        os.posix_fallocate(descriptor, 0, 8 * numbers)  # fails here where memory is short
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

    def _entered(self, processes: slice) -> bool:
        """Whether these have entered the current call (at first: have connected)."""
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

        A call for each ``8 * capacity`` bytes, in slots that alternate as those of sums do. Raises
        LostPeerError as a sum does.
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
        """Wait until all have called. Raises LostPeerError as a sum does."""
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
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, peer)  # or others would take this one for it
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


def _open_file(index: int, sum_over_ranks: Sum) -> Optional[int]:
    """A descriptor of a memory file that process 0 makes; None where this process does not get it.

    Unlike /dev/shm, a memfd is not limited by the container and leaves no file behind. The peers
    ask process 0 for it at a socket that is no file: /proc/PID/fd is closed where ranks have user
    namespaces of their own (launch/core/network.py).
    """
    file, number = array.array("i"), 0
    with socket.socket(socket.AF_UNIX) as own:
        if index == 0 and possible():
            with contextlib.suppress(OSError):  # a sandbox may forbid it
                file.append(os.memfd_create("ranks_memory"))
                number = secrets.randbelow(2**53)
                own.bind(b"\0ranks_%x" % number)
                own.listen(_MOST)
        number = int(sum_over_ranks(np.array([number], np.float64))[0])
        if index > 0:
            own.setblocking(False)  # a queue that strangers have filled is not waited for
            with contextlib.suppress(OSError):  # it is in another network namespace
                own.connect(b"\0ranks_%x" % number)
        sum_over_ranks(np.zeros(1))  # whoever can has connected
        own.setblocking(index > 0)
        with contextlib.suppress(OSError):  # all have been answered; or there is no connection
            for _ in range(_MOST if index == 0 else 0):
                peer, _ = own.accept()
                with peer:
                    if _is_own(peer):
                        peer.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, file)])
            if index > 0 and _is_own(own):
                _, ancillary, *_ = own.recvmsg(1, _ONE_FILE, socket.MSG_CMSG_CLOEXEC)
                for *_, data in ancillary:
                    file.frombytes(data)
    return file[0] if file else None


def _is_own(connection: socket.socket) -> bool:
    """Whether the other end is a process of this user, in whatever namespace."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return bool(struct.unpack("iII", credentials)[1] == os.geteuid())


def _opened_by_all(
    index: int, size: int, sum_over_ranks: Sum, use: Callable[[int], T]
) -> Optional[T]:
    """``use`` of the shared file, whose descriptor it takes over; None on all unless all can."""
    descriptor = _open_file(index, sum_over_ranks)
    used = None
    if descriptor is not None:
        with contextlib.suppress(OSError):
            used = use(descriptor)
    opened = sum_over_ranks(np.array([used is not None], np.float64))[0]
    return used if opened == size else None


def open_shared(size: int, index: int, processes: int, sum_over_ranks: Sum) -> Optional[mmap.mmap]:
    """``size`` zeroed bytes shared by all ``processes``; None on all unless all have access."""

    def use(descriptor: int) -> mmap.mmap:
        with open(descriptor, "r+b", buffering=0):
            os.posix_fallocate(descriptor, 0, size)
            return mmap.mmap(descriptor, size)

    return _opened_by_all(index, processes, sum_over_ranks, use)


def connect(
    capacity: int, index: int, size: int, sum_over_ranks: Sum, beyond: Optional[Beyond] = None
) -> Optional[SharedMemorySum]:
    """Connect to the peers; None on all of them unless all share this node's memory.

    Args:
        capacity: the most numbers in a vector.
        index: of this process among ``size``, from 0.
        sum_over_ranks: another allreduce of float64 vectors over the same processes.
        beyond: where the sums are over the processes of several nodes.
    """
    own = capacity, index, size, beyond
    return _opened_by_all(index, size, sum_over_ranks, lambda file: SharedMemorySum(file, *own))

"""The sum of a batch norm layer's vectors over ranks: in memory, over TCP, or by Horovod."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import time
import weakref
from typing import Any, Callable, Dict, Iterator, Optional

import mxnet as mx
import numpy as np
from mxnet import nd

from .. import dist
from ..dist import shared_memory

Sum = Callable[[np.ndarray], np.ndarray]

# In the environment: 1, C++ on CPUs; 0, Python; device, on CPUs too all that GPUs do.
SWITCH = "BATCH_NORM_NATIVE"


class _Registry:
    """What the synced layers of a process have in common; one object, which lives as long as it.

    Operators get no Python objects, only strings, and run in threads of MXNet's engine, in Python
    or in C++: what they need beyond their arrays is found here. C++ reads, or adds to, C variables.
    """

    def __init__(self) -> None:
        # Every one by its serial, until its layer is gone.
        self.alive: weakref.WeakValueDictionary[int, RankSum] = weakref.WeakValueDictionary()
        self.kept: Dict[int, RankSum] = {}  # until their first sum, for which C++ calls back
        self.batch_is_empty = ctypes.c_int(0)  # 1 within empty_batch()
        self.seconds = 0.0  # that sums in Python have taken, waiting included
        self.nanoseconds = ctypes.c_int64(0)  # and those in C++
        # Who will never call, and why: MXNet's own message of an operator's error does not say.
        self.lost: Optional[str] = None
        self._serials, self.turns = itertools.count(), itertools.count()  # turns: of first use

    def enter(self, rank_sum: RankSum) -> int:
        """The serial of a new RankSum: how many the process has made before."""
        serial = next(self._serials)
        self.alive[serial] = rank_sum
        return serial


registry = _Registry()


@contextlib.contextmanager
def empty_batch() -> Iterator[None]:
    """Within it this rank has no samples of the global batch, and runs one only to stay in step.

    Wrap forward *and* backward, and give the loss the weight 0: the placeholder sample then has no
    influence on moments, gradients and running statistics. Waits for the device on both sides.
    """
    mx.nd.waitall()  # the flag is read when the engine runs a layer, not when it is called
    registry.batch_is_empty.value = 1
    try:
        yield
        mx.nd.waitall()
    finally:
        registry.batch_is_empty.value = 0


class RankSum:
    """Allreduce of a layer's float64 vectors over the ranks of a process set (None: all ranks).

    The engine runs the operators of one layer one at a time and in program order, because they
    share the layer's running statistics with kernels that write them. So a layer's n-th sum on one
    rank always meets the n-th on the others, in whatever order the engine schedules layers.

    Attributes:
        serial: its number in this process.
        turn: in the order of first use, the same on all ranks; None until it is used.
        number: its number for all peers, which :meth:`connect` takes from the first of them.
        operator_type: of the layer's operator, once its first step has chosen one.
        collected: running total of the sums in forward, once calibration sets it to an array.
        shared: what adds up after the first call; None where Horovod does.
    """

    def __init__(self, process_set: Any):
        self.serial = self.number = registry.enter(self)
        self.process_set = process_set
        self.turn: Optional[int] = None
        self.operator_type: Optional[str] = None
        self.collected: Optional[nd.NDArray] = None
        self.shared: Optional[shared_memory.SharedMemorySum] = None
        self.unshare: Optional[Callable[[], object]] = None  # where C++ uses the shared memory
        self._connected = False

    def __reduce__(self) -> Any:
        """Unpickle as a new one, of the ranks there: serials and shared memory are a process's."""
        return RankSum, (self.process_set,)

    @property
    def size(self) -> int:
        return dist.world_size() if self.process_set is None else self.process_set.size()

    def used(self) -> None:
        """Its layer is called, by the program or to be compiled."""
        if self.turn is None:
            self.turn = next(registry.turns)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if not self._connected:
            self._connect_in_turn(values.size)
        start = time.perf_counter()
        try:
            total = self._allreduce(values) if self.shared is None else self.shared(values)
        except shared_memory.LostPeerError as error:
            registry.lost = str(error)
            raise
        registry.seconds += time.perf_counter() - start
        return total

    def on_device(self, array: nd.NDArray) -> nd.NDArray:
        """The sum of a float64 array over ranks, on its device; on GPUs the host waits for none."""
        if array.context.device_type == "cpu" and os.environ.get(SWITCH) != "device":
            return nd.array(self(array.asnumpy()), dtype=array.dtype)
        if not self._connected:
            self._connect_in_turn(array.size)
        return dist.allreduce_sum_(array, f"batch_norm.{self.number}", self.process_set)

    def connect(self, capacity: int, meet: Sum) -> None:
        """Set up shared memory, and the way to other nodes, if all ranks have it; collective.

        Args:
            capacity: length of the longest vector, which is forward's.
            meet: another allreduce of float64 vectors over the same ranks.

        Raises RuntimeError, on all ranks, where their layers differ in width.
        """
        if self.size > 1:
            first = self.serial if self._index == 0 else 0
            number, total, squares = meet(np.array([first, capacity, capacity**2], np.float64))
            if total**2 != self.size * squares:  # equal if and only if all capacities are
                raise RuntimeError(
                    f"the ranks differ in a layer: this one has {capacity // 2} channels here; "
                    "make the same layers, and call them in the same order, on every rank"
                )
            self.number = int(number)
            self.shared = self._share(capacity, meet)
        self._connected = True

    def _connect_in_turn(self, capacity: int) -> None:
        # By Horovod: small sums of the engine's thread would get among those of the main one.
        name = f"batch_norm.first.{self.turn}"
        self.connect(capacity, functools.partial(self._allreduce, name=name))

    def connect_at(self, place: int, capacity: int) -> None:
        """The same for the norm at that ``place`` of a net, on all ranks at once."""
        meet = dist.allreduce_sum if self.process_set is None else self._allreduce
        self.connect(capacity, functools.partial(meet, name=f"batch_norm.connect.{place}"))

    def disconnect(self) -> None:
        """Let go of shared memory; after the last sum of all ranks. The next one connects anew."""
        if self.unshare is not None:
            self.unshare()
        self.shared, self._connected = None, False

    @property
    def _index(self) -> int:
        return dist.rank() if self.process_set is None else self.process_set.rank()

    def _share(self, capacity: int, meet: Sum) -> Optional[shared_memory.SharedMemorySum]:
        if self.process_set is None:
            return dist.connect_sum(capacity, 1 + self.number, meet)
        return shared_memory.connect(capacity, self._index, self.size, meet)

    def _allreduce(self, values: np.ndarray, name: str = "") -> np.ndarray:
        tensor = nd.array(values, ctx=mx.cpu(), dtype=np.float64)
        name = name or f"batch_norm.{self.number}"
        return dist.allreduce_sum_(tensor, name, self.process_set).asnumpy()

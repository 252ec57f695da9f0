"""The sum of a batch norm layer's vectors over ranks, in shared memory or by Horovod."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import time
import weakref
from typing import Any, Callable, ClassVar, Iterator, Optional

import mxnet as mx
import numpy as np
from mxnet import nd

from .. import dist
from ..dist import shared_memory

batch_is_empty = ctypes.c_int(0)  # a C variable, because the C++ operator reads it too


@contextlib.contextmanager
def empty_batch() -> Iterator[None]:
    """Within it this rank has no samples of the global batch, and runs one only to stay in step.

    Wrap forward *and* backward, and give the loss the weight 0: the placeholder sample then has no
    influence on moments, gradients and running statistics. Waits for the device on both sides.
    """
    mx.nd.waitall()  # the flag is read when the engine runs a layer, not when it is called
    batch_is_empty.value = 1
    try:
        yield
        mx.nd.waitall()
    finally:
        batch_is_empty.value = 0


class RankSum:
    """Allreduce of a layer's float64 vectors over the ranks of a process set (None: all ranks).

    The engine runs the operators of one layer one at a time and in program order, because they
    share the layer's running statistics with kernels that write them. So a layer's n-th sum on one
    rank always meets the n-th on the others, in whatever order the engine schedules layers.

    Attributes:
        alive: the instances of this process by ``serial``, which is the same on all peers.
        collected: running total of the sums in forward, once calibration sets it to an array.
        shared: the shared memory in use after the first call; None where Horovod is.
        seconds: time that all sums of this process have taken, waiting included, without those in
            C++: see :func:`coefficients_native.seconds_of_sums`.
    """

    _serials = itertools.count()
    alive: ClassVar[weakref.WeakValueDictionary[int, RankSum]] = weakref.WeakValueDictionary()
    seconds: ClassVar[float] = 0.0

    def __init__(self, process_set: Any):
        self.serial = next(self._serials)
        self.process_set = process_set
        self.collected: Optional[np.ndarray] = None
        self.shared: Optional[shared_memory.SharedMemorySum] = None
        self._connected = False
        self.alive[self.serial] = self

    def __reduce__(self) -> Any:
        """Unpickle as a new one, of the ranks there: serials and shared memory are a process's."""
        return RankSum, (self.process_set,)

    @property
    def size(self) -> int:
        return dist.world_size() if self.process_set is None else self.process_set.size()

    @property
    def crosses_nodes(self) -> bool:
        """Whether its ranks are known to be on several nodes."""
        return self.process_set is None and dist.local_size() < dist.world_size()

    @property
    def _index(self) -> int:
        return dist.rank() if self.process_set is None else self.process_set.rank()

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if not self._connected:
            self.connect(values.size, self._allreduce)
        start = time.perf_counter()
        total = self._allreduce(values) if self.shared is None else self.shared(values)
        RankSum.seconds += time.perf_counter() - start
        return total

    def connect(self, capacity: int, sum_over_ranks: Callable[[np.ndarray], np.ndarray]) -> None:
        """Set up shared memory if all ranks have access to it; collective.

        Args:
            capacity: length of the longest vector, which is forward's.
            sum_over_ranks: another allreduce of float64 vectors over the same ranks.
        """
        self.shared = self._share(capacity, sum_over_ranks)
        self._connected = True

    def _share(
        self, capacity: int, sum_over_ranks: Callable[[np.ndarray], np.ndarray]
    ) -> Optional[shared_memory.SharedMemorySum]:
        if self.crosses_nodes or self.size == 1:
            return None
        return shared_memory.connect(capacity, self._index, self.size, sum_over_ranks)

    def _allreduce(self, values: np.ndarray) -> np.ndarray:
        tensor = nd.array(values, ctx=mx.cpu(), dtype=np.float64)
        return dist.allreduce_sum_(tensor, f"batch_norm.{self.serial}", self.process_set).asnumpy()

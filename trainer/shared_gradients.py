"""Gradients of the ranks of one node, added up in memory that they share.

Between processes of one machine Horovod's Gloo sends gradients through TCP sockets: each byte is
copied into a buffer, into the kernel, out of it, and back. On CPUs that takes time from the step
itself. Here each rank copies its gradients once, a piece at a time that the caches hold, and reads
the others'. The sum is taken in the order of the ranks, so every run and every rank gets the same
bits; for two ranks they are those that Horovod gives.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional

import mxnet as mx
import numpy as np

from . import dist, launched, shared_memory
from .config import Optimizer
from .placement import dense_on_cpu, memory_of

MAX_RANKS = 8  # each reads what all others wrote: with more, a ring moves less
_PIECE = 2**17  # float64 numbers; 1 MiB


def wanted(settings: Optimizer) -> bool:
    """Whether gradients are to go this way, where the ranks turn out to share one memory."""
    few = launched.size() <= MAX_RANKS
    return settings.shared_memory and not settings.fp16_allreduce and few


class SharedGradients:
    """Adds up the gradients of ``trainer`` over ranks; a stand-in for its own way of doing so.

    Where the ranks do not share one node's memory, it is that way (Horovod's).
    """

    def __init__(self, trainer: mx.gluon.Trainer):
        self._parameters = trainer._params
        self._otherwise: Callable[[], None] = trainer._allreduce_grads
        self._shared: Optional[shared_memory.SharedMemorySum] = None
        self._connected = False

    def __getstate__(self) -> Dict[str, Any]:
        """A net that is sent elsewhere takes its trainer along, which has to meet others there."""
        return {**vars(self), "_shared": None, "_connected": False}

    def __call__(self) -> None:
        """Replace every gradient by its sum; waits for backward, and blocks until all ranks call.

        Raises:
            MXNetError: backward failed, or through Horovod: another rank has ended.
            RuntimeError: another rank has ended.
        """
        arrays = [p.list_grad()[0] for p in self._parameters if p.grad_req != "null"]
        if not self._connected:
            self._shared = self._connect(arrays)
            self._connected = True
        if self._shared is None:
            self._otherwise()
            return
        for array in arrays:
            array.wait_to_read()
        for array in arrays:
            self._shared.add_up(memory_of(array).reshape(-1))

    def _connect(self, arrays: List[mx.nd.NDArray]) -> Optional[shared_memory.SharedMemorySum]:
        if dist.local_size() < dist.world_size() or dist.world_size() > MAX_RANKS:
            return None
        if not all(dense_on_cpu(array, np.float32, np.float64) for array in arrays):
            return None
        return shared_memory.connect(_PIECE, dist.rank(), dist.world_size(), _sum_over_ranks)


def _sum_over_ranks(values: np.ndarray) -> np.ndarray:
    return dist.allreduce_sum(values, "shared_gradients")

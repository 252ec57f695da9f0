"""Gradients of the ranks of one node, added up in memory that they share.

Between processes of one machine Horovod's Gloo sends gradients through TCP sockets: each byte is
copied into a buffer, into the kernel, out of it, and back. On CPUs that takes time from the step
itself. Here each rank copies its gradients once, a piece at a time that the caches hold, and reads
the others'. The sum is taken in the order of the ranks, so every run and every rank gets the same
bits; for two ranks they are those that Horovod gives.
"""

from __future__ import annotations

import threading
from typing import Any, Callable, Dict, List, Optional

import mxnet as mx
import numpy as np

from . import dist, shared_memory
from .placement import memory_of, on_cpu_in_float32

MAX_RANKS = 8  # each reads what all others wrote: with more, a ring moves less
_PIECE = 2**17  # float64 numbers; 1 MiB


class SharedGradients:
    """Adds up the gradients of ``trainer`` over ranks; a stand-in for its own way of doing so.

    Where the ranks do not share one node's memory, it is that way (Horovod's).
    """

    def __init__(self, trainer: mx.gluon.Trainer):
        self._parameters = trainer._params
        self._otherwise: Callable[[], None] = trainer._allreduce_grads
        self._shared: Optional[shared_memory.SharedMemorySum] = None
        self._connected = False
        self._presence: Optional[Presence] = None

    def __getstate__(self) -> Dict[str, Any]:
        """A net that is sent elsewhere takes its trainer along, which has to meet others there."""
        return {**vars(self), "_shared": None, "_connected": False, "_presence": None}

    def __call__(self) -> None:
        """Replace every gradient by its sum; waits for backward, and blocks until all ranks call.

        Raises:
            MXNetError: another rank has ended or hangs.
            RuntimeError: another rank has ended after it had come.
        """
        arrays = [p.list_grad()[0] for p in self._parameters if p.grad_req != "null"]
        if not self._connected:
            self._shared = self._connect(arrays)
            self._connected = True
        if self._shared is None:
            self._otherwise()
            return
        shared = self._shared
        self._presence = presence = Presence(self._presence)
        try:
            for array in arrays:
                array.wait_to_read()
        except mx.MXNetError:
            presence.wait()  # what failed may have missed a lost rank, which Horovod tells better
            raise

        def look() -> None:
            if presence.check():  # whoever is lost, is lost since
                shared.look_for_the_dead()

        shared.look = look
        for array in arrays:
            shared.add_up(memory_of(array).reshape(-1))

    def _connect(self, arrays: List[mx.nd.NDArray]) -> Optional[shared_memory.SharedMemorySum]:
        if dist.local_size() < dist.world_size() or dist.world_size() > MAX_RANKS:
            return None
        if not all(map(on_cpu_in_float32, arrays)):
            return None
        return shared_memory.connect(_PIECE, dist.rank(), dist.world_size(), _sum_by_horovod)


class Presence:
    """That all ranks have come to a step's sum, as Horovod sees it, which notices the lost ones.

    Every rank says so without waiting for the answer. It is asked for only by a rank that has
    waited long for its peers in shared memory, where one that was stopped would never be missed.
    """

    def __init__(self, last: Optional[Presence]):
        if last is not None:
            last.wait()  # done long ago; frees the name
        self._flag: mx.nd.NDArray = dist.allreduce_sum_(
            mx.nd.zeros((1,)), "shared_gradients.presence"
        )
        self._waiting: Optional[threading.Thread] = None
        self._all_came = False
        self._error: Optional[mx.MXNetError] = None

    def check(self) -> bool:
        """Whether all ranks have come, as far as is known; raises if Horovod has given one up."""
        if self._waiting is None:
            self._waiting = threading.Thread(target=self._wait, daemon=True)
            self._waiting.start()
        if self._error is not None:
            raise self._error
        return self._all_came

    def wait(self) -> None:
        """Return when all ranks have come, or raise what Horovod has found."""
        self._flag.wait_to_read()

    def _wait(self) -> None:
        try:
            self.wait()
            self._all_came = True
        except mx.MXNetError as error:
            self._error = error


def _sum_by_horovod(values: np.ndarray) -> np.ndarray:
    return dist.allreduce_sum(values, "shared_gradients")

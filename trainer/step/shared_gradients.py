"""Allreduce of gradients in place, in memory that the ranks of one node share.

Gloo would copy each byte four times, on the cores that compute. Here backward writes each rank's
gradients directly into shared memory, and each rank replaces a shard of the first rank's by the
sums, which all read there: the first half of Rabenseifner's algorithm ("Optimization of collective
reduction operations", ICCS 2004). Sums run in rank order, so every run and every rank gets the same
bits; on two ranks, the same as Horovod's.
"""

from __future__ import annotations

from typing import Any, ContextManager, Dict, List, Optional

import mxnet as mx
import numpy as np

from .. import dist
from ..config import Optimizer
from ..dist import half_sum, shared_memory
from ..dist.array_memory import dense_on_cpu
from ..mxnet_internals import all_parameters, allreduce_of, clear_static_graphs
from . import momentum
from .buckets import Buckets
from .gradient_rows import Rows

_MOVES = 20  # into shared memory, per trainer: each takes a file descriptor and a mapping


def wanted(settings: Optimizer) -> bool:
    """Whether the settings ask for this allreduce, should the ranks be able to share memory."""
    return settings.shared_memory and not settings.fp16_allreduce


class SharedGradients:
    """Replaces what ``trainer.allreduce_grads`` calls.

    Falls back to the original (Horovod's) where the ranks cannot share memory, and where gradients
    keep being moved out of it: by another trainer of the same parameters, or by freezing layers in
    every step.
    """

    def __init__(self, trainer: mx.gluon.Trainer):
        self._parameters = all_parameters(trainer)
        self._fallback: Buckets = allreduce_of(trainer)  # type: ignore[assignment]
        self._shared: Optional[Rows] = None
        self._moves_left = _MOVES

    def __getstate__(self) -> Dict[str, Any]:
        """Without the mapping: a net pickled with its trainer has other peers where it arrives."""
        return {**vars(self), "_shared": None, "_moves_left": _MOVES}

    def __call__(self) -> None:
        """Replace every gradient by its sum over ranks; waits for backward; collective.

        Raises:
            MXNetError: backward failed, or, through Horovod, a peer has died.
            RuntimeError: a peer has died.
        """
        shared = self.shared()
        if shared is None:
            self._fallback()
        else:
            shared.allreduce()

    def shared(self) -> Optional[Rows]:
        """The gradients, now in shared memory; None if they cannot be there; collective."""
        trained = [p for p in self._parameters if p.grad_req != "null"]
        if self._shared is not None and not self._shared.holds(trained):
            self.release()
        if self._shared is None and self._moves_left > 0:
            self._shared = self._share(trained)
            self._moves_left = self._moves_left - 1 if self._shared is not None else 0
        return self._shared

    def _share(self, parameters: List[mx.gluon.Parameter]) -> Optional[Rows]:
        """Move the gradients into shared memory; None where that is impossible; collective.

        Raises ConfigError where the ranks train different parameters.
        """
        dense = all(dense_on_cpu(p.list_grad()[0], np.float32, np.float64) for p in parameters)
        if dist.any_rank(not dense, "shared_gradients.dense"):
            return None
        one_node = dist.ranks_share_memory() and not self._fallback.half
        leaders = None if one_node else dist.leaders_process_set()
        if not one_node and leaders is None:
            return None
        buckets = self._fallback.planned()
        if one_node:
            by_dtype = (np.float64, np.float32)
            buckets = [[p for p in parameters if p.list_grad()[0].dtype == d] for d in by_dtype]
        index, size, meet = dist.local_rank(), dist.local_size(), _sum_over_node
        row = Rows.bytes_of(parameters, len(buckets))
        memory = shared_memory.open_shared(size * row, index, size, meet)
        peers = shared_memory.connect(1, index, size, meet)
        if dist.any_rank(memory is None or peers is None, "shared_gradients.memory"):
            return None
        compiled = not dist.any_rank(momentum.library() is None, "shared_gradients.compiled")
        assert memory is not None and peers is not None
        shared = Rows([b for b in buckets if b], memory, row, peers, compiled)
        if not one_node:
            half = half_sum.everywhere() if self._fallback.half else None
            shared.join_nodes(half, leaders)
        clear_static_graphs(parameters)
        return shared

    def release(self) -> None:
        """Move the gradients back to private memory and free the shared memory."""
        if self._shared is not None:
            self._shared.release()
            self._shared = None


def _of(trainer: mx.gluon.Trainer) -> Optional[SharedGradients]:
    reduce = allreduce_of(trainer)
    return reduce if isinstance(reduce, SharedGradients) else None


def release(trainer: mx.gluon.Trainer) -> None:
    """Move the gradients of ``trainer`` back to private memory, if they were shared."""
    gradients = _of(trainer)
    if gradients is not None:
        gradients.release()


def summed(trainer: mx.gluon.Trainer) -> Optional[ContextManager[momentum.Addresses]]:
    """Where the gradients' sums over ranks are, by the index of a parameter in ``trainer``.

    They can be read within the context. None on all ranks if they share no memory, or one has no
    compiled update; collective.
    """
    gradients = _of(trainer)
    shared = None if gradients is None else gradients.shared()
    if shared is None or not shared.update_can_read:
        return None
    indices = {id(parameter): index for index, parameter in enumerate(all_parameters(trainer))}
    return shared.summed(indices)


def _sum_over_node(values: np.ndarray) -> np.ndarray:
    node = dist.node_process_set()
    if node is None:
        return dist.allreduce_sum(values, "shared_gradients")
    array = mx.nd.array(values, dtype=values.dtype)
    return dist.allreduce_sum_(array, "shared_gradients", node).asnumpy()

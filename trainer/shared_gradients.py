"""Gradients of the ranks of one node, added up where they lie: in memory that the ranks share.

Between processes of one machine Horovod's Gloo sends gradients through TCP sockets: each byte is
copied into a buffer, into the kernel, out of it, and back. On CPUs that takes time from the step
itself. Here backward writes each rank's gradients into memory that the others see. Each rank adds
up its share of the numbers and then copies the other shares' sums from those who have taken them:
a reduce-scatter and an allgather (Rabenseifner, "Optimization of collective reduction operations",
ICCS 2004), whatever the number of ranks. A sum is taken in the order of the ranks, so every run
and every rank gets the same bits; for two ranks they are those that Horovod gives.
"""

from __future__ import annotations

import gc
import mmap
from typing import Any, Callable, Dict, List, Optional, Tuple

import mxnet as mx
import numpy as np

from . import dist, shared_memory
from .config import Optimizer
from .placement import around_memory, dense_on_cpu

_BLOCK = 2**16  # numbers, which a core's cache holds for all ranks
_MOVES = 20  # of a trainer's gradients into shared memory: each costs a descriptor and a mapping


def wanted(settings: Optimizer) -> bool:
    """Whether gradients are to go this way, where the ranks turn out to share one memory."""
    return settings.shared_memory and not settings.fp16_allreduce


class SharedGradients:
    """Adds up the gradients of ``trainer`` over ranks; a stand-in for its own way of doing so.

    Where the ranks do not share one node's memory, it is that way (Horovod's); and where others
    keep on taking the gradients out: another trainer of the same parameters, or freezing them at
    each step.
    """

    def __init__(self, trainer: mx.gluon.Trainer):
        self._parameters = trainer._params
        self._otherwise: Callable[[], None] = trainer._allreduce_grads
        self._shared: Optional[_Shared] = None
        self._moves_left = _MOVES

    def __getstate__(self) -> Dict[str, Any]:
        """A net that is sent elsewhere takes its trainer along, which has to meet others there."""
        return {**vars(self), "_shared": None, "_moves_left": _MOVES}

    def __call__(self) -> None:
        """Replace every gradient by its sum; waits for backward, and blocks until all ranks call.

        Raises:
            MXNetError: backward failed, or through Horovod: another rank has ended.
            RuntimeError: another rank has ended.
        """
        trained = [p for p in self._parameters if p.grad_req != "null"]
        if self._shared is not None and not self._shared.holds(trained):
            self.release()
        if self._shared is None and self._moves_left > 0:
            self._shared = _share(trained)
            self._moves_left = self._moves_left - 1 if self._shared is not None else 0
        if self._shared is None:
            self._otherwise()
        else:
            self._shared.add_up()

    def release(self) -> None:
        """Give the parameters gradients of their own again, and the shared memory back."""
        if self._shared is not None:
            self._shared.release()
            self._shared = None


def release(trainer: mx.gluon.Trainer) -> None:
    """Give the net that ``trainer`` trained gradients of its own, where the ranks shared them."""
    if isinstance(trainer._allreduce_grads, SharedGradients):
        trainer._allreduce_grads.release()


def _share(parameters: List[mx.gluon.Parameter]) -> Optional[_Shared]:
    """Move the parameters' gradients into memory that the ranks share; None where there is none.

    Collective.
    """
    if not dist.in_one_memory():
        return None
    if not all(dense_on_cpu(p.list_grad()[0], np.float32, np.float64) for p in parameters):
        return None
    rank, ranks = dist.rank(), dist.world_size()
    row = _Shared.bytes_of(parameters)
    memory = shared_memory.open_together(ranks * row, rank, ranks, _sum_over_ranks)
    meeting = shared_memory.connect(1, rank, ranks, _sum_over_ranks)
    if memory is None or meeting is None:
        return None
    shared = _Shared(parameters, memory, row, meeting)
    _forget_static_graphs(parameters)
    return shared


class _Shared:
    """Every rank's gradients: a row of bytes for each, with the float64 ones before the others."""

    def __init__(
        self,
        parameters: List[mx.gluon.Parameter],
        memory: mmap.mmap,
        row: int,
        meeting: shared_memory.SharedMemorySum,
    ):
        self._memory, self._row, self._meeting = memory, row, meeting
        _mapped.append(memory)
        rows = np.frombuffer(memory, np.uint8).reshape(meeting.size, row)
        self._parameters: List[mx.gluon.Parameter] = []
        self._gradients: List[mx.nd.NDArray] = []
        # (ranks, numbers) of each dtype, and the shares of the numbers.
        self._flat: List[Tuple[np.ndarray, List[slice]]] = []
        start = 0
        for dtype in (np.float64, np.float32):
            alike = [p for p in parameters if p.list_grad()[0].dtype == dtype]
            numbers = sum(p.list_grad()[0].size for p in alike)
            stop = start + numbers * np.dtype(dtype).itemsize
            flat = rows[:, start:stop].view(dtype)
            own, start = flat[meeting.index], stop
            for parameter in alike:
                old = parameter.list_grad()[0]
                place, own = own[: old.size].reshape(old.shape), own[old.size :]
                place[...] = old.asnumpy()
                self._gradients.append(around_memory(place, type(old)))
                _set_gradient(parameter, self._gradients[-1])
            self._parameters += alike
            self._flat.append((flat, _shares(numbers, meeting.size)))

    @staticmethod
    def bytes_of(parameters: List[mx.gluon.Parameter]) -> int:
        """A row's, in whole pages."""
        arrays = [p.list_grad()[0] for p in parameters]
        needed = sum(array.size * np.dtype(array.dtype).itemsize for array in arrays)
        return -(-needed // mmap.PAGESIZE) * mmap.PAGESIZE

    def holds(self, parameters: List[mx.gluon.Parameter]) -> bool:
        """Whether just these have their gradients here still."""
        own = {id(gradient) for gradient in self._gradients}
        return {id(p.list_grad()[0]) for p in parameters} == own

    def add_up(self) -> None:
        """Replace every gradient by its sum."""
        mx.nd.waitall()  # for backward, and for whoever reads a gradient still
        rank = self._meeting.index
        self._meeting.meet()
        for flat, shares in self._flat:
            _sum_rows(flat, shares[rank], flat[rank])
        self._meeting.meet()
        for flat, shares in self._flat:
            for other, share in enumerate(shares):
                if other != rank:
                    flat[rank, share] = flat[other, share]
        self._meeting.meet()  # or backward would write over what others still read

    def release(self) -> None:
        """Take the gradients out; others' are not touched.

        The mapping stays, as arrays that somebody holds still point into it: they read zeros.
        """
        mx.nd.waitall()
        for parameter, gradient in zip(self._parameters, self._gradients):
            if parameter._grad is not None and parameter._grad[0] is gradient:
                _set_gradient(parameter, gradient.copy())
        mx.nd.waitall()
        _forget_static_graphs(self._parameters)
        self._memory.madvise(mmap.MADV_REMOVE, self._meeting.index * self._row, self._row)


_mapped: List[mmap.mmap] = []  # never unmapped, as arrays of MXNet's know nothing of it


def _shares(numbers: int, ranks: int) -> List[slice]:
    """One for each rank, as alike as can be."""
    ends = [numbers * rank // ranks for rank in range(ranks + 1)]
    return [slice(start, stop) for start, stop in zip(ends, ends[1:])]


def _sum_rows(rows: np.ndarray, share: slice, out: np.ndarray) -> None:
    """Write a share of the sum of all rows, in their order, to ``out``, which may be one."""
    for start in range(share.start, share.stop, _BLOCK):
        block = slice(start, min(start + _BLOCK, share.stop))
        total = rows[0, block]
        for row in rows[1:-1, block]:
            total = total + row
        np.add(total, rows[-1, block], out=out[block])


def _set_gradient(parameter: mx.gluon.Parameter, gradient: mx.nd.NDArray) -> None:
    """Have backward write a parameter's gradient into another array, which has it already."""
    data = parameter.list_data()
    fresh = data[0]._fresh_grad
    parameter._grad = [gradient]
    mx.autograd.mark_variables(data, parameter._grad, parameter.grad_req)
    data[0]._fresh_grad = fresh


def _forget_static_graphs(parameters: List[mx.gluon.Parameter]) -> None:
    """Have graphs made anew that would go on writing to the arrays with which they were made.

    A parameter does not know the blocks that use it, so all that are alive are looked at.
    """
    moved = set(map(id, parameters))
    for block in gc.get_objects():
        # No isinstance, which asks the object itself: some raise errors.
        is_block = issubclass(type(block), mx.gluon.HybridBlock)
        if is_block and getattr(block, "_cached_op", None) is not None:
            static = dict(block._flags).get("static_shape")
            if static and moved & set(map(id, block.collect_params().values())):
                block._clear_cached_op()


def _sum_over_ranks(values: np.ndarray) -> np.ndarray:
    return dist.allreduce_sum(values, "shared_gradients")

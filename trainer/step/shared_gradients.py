"""Allreduce of gradients in place, in memory that the ranks of one node share.

Between processes of one machine Horovod's Gloo sends gradients through TCP sockets: each byte is
copied into a buffer, into the kernel, out of it and back, on the cores that compute the step. Here
backward writes each rank's gradients directly into shared memory. Each rank sums its own shard of
the elements, then copies the other shards' sums from their owners: a reduce-scatter followed by an
allgather (Rabenseifner, "Optimization of collective reduction operations", ICCS 2004). Sums run in
rank order, so every run and every rank gets the same bits; on two ranks, the same as Horovod's.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
)

import mxnet as mx
import numpy as np

from .. import dist
from ..config import Optimizer
from ..dist import shared_memory
from ..dist.array_memory import around_memory, dense_on_cpu
from ..mxnet_internals import (
    all_parameters,
    allreduce_of,
    clear_static_graphs,
    gradient_or_none,
    set_gradient,
    wait_to_write,
)
from . import half_sum, momentum
from .buckets import Buckets

_BLOCK = 2**16  # elements: the blocks of all ranks fit into a core's cache
# Ranks; with more, reading all gradients costs more than exchanging sums.
_READ_BY_ALL = momentum.MOST_GRADIENTS
_ALIGNED = 64  # bytes: where a bucket begins
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
        self._shared: Optional[_Shared] = None
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

    def shared(self) -> Optional[_Shared]:
        """The gradients, now in shared memory; None if they cannot be there; collective."""
        trained = [p for p in self._parameters if p.grad_req != "null"]
        if self._shared is not None and not self._shared.holds(trained):
            self.release()
        if self._shared is None and self._moves_left > 0:
            self._shared = self._share(trained)
            self._moves_left = self._moves_left - 1 if self._shared is not None else 0
        return self._shared

    def _share(self, parameters: List[mx.gluon.Parameter]) -> Optional[_Shared]:
        """Move the gradients into shared memory; None where that is impossible; collective."""
        one_node = dist.ranks_share_memory() and not self._fallback.half
        leaders = None if one_node else dist.leaders_process_set()
        if not one_node and leaders is None:
            return None
        dense = all(dense_on_cpu(p.list_grad()[0], np.float32, np.float64) for p in parameters)
        if dist.any_rank(not dense, "shared_gradients.dense"):
            return None
        if one_node:
            by_dtype = (np.float64, np.float32)
            buckets = [[p for p in parameters if p.list_grad()[0].dtype == d] for d in by_dtype]
        else:
            buckets = self._fallback.planned()
        index, size, meet = dist.local_rank(), dist.local_size(), _sum_over_node
        row = _Shared.bytes_of(parameters, len(buckets))
        memory = shared_memory.open_shared(size * row, index, size, meet)
        peers = shared_memory.connect(1, index, size, meet)
        if dist.any_rank(memory is None or peers is None, "shared_gradients.memory"):
            return None
        compiled = not dist.any_rank(momentum.library() is None, "shared_gradients.compiled")
        assert memory is not None and peers is not None
        shared = _Shared([b for b in buckets if b], memory, row, peers, compiled)
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


def used_by(trainer: mx.gluon.Trainer) -> bool:
    """Whether ``trainer`` reduces gradients in shared memory, should the ranks be able to."""
    return _of(trainer) is not None


def release(trainer: mx.gluon.Trainer) -> None:
    """Move the gradients of ``trainer`` back to private memory, if they were shared."""
    gradients = _of(trainer)
    if gradients is not None:
        gradients.release()


def rows(trainer: mx.gluon.Trainer) -> Optional[ContextManager[momentum.Addresses]]:
    """The addresses of all ranks' gradients, by the index of the parameter in ``trainer``.

    They can be read within the context, which waits for backward and, at its end, for the ranks to
    have read them. None on all ranks if they share no memory, are so many that reading all
    gradients would be slower than an allreduce, or one has no compiled update; collective.
    """
    gradients = _of(trainer)
    if gradients is None:
        return None
    shared = gradients.shared()
    if shared is None or not shared.update_can_add or shared.rows_to_add > _READ_BY_ALL:
        return None
    indices = {id(parameter): index for index, parameter in enumerate(all_parameters(trainer))}
    return shared.rows(indices)


class _Part(NamedTuple):
    """Gradients of one dtype that are added up together."""

    rows: np.ndarray  # (ranks, numbers)
    shares: List[slice]  # the shard of each rank
    gradients: List[mx.nd.NDArray]  # of this rank


class _Shared:
    """The gradients of every rank of this node: one row of bytes each, bucket after bucket."""

    def __init__(
        self,
        buckets: Sequence[Sequence[mx.gluon.Parameter]],
        memory: mmap.mmap,
        row: int,
        peers: shared_memory.SharedMemorySum,
        update_can_add: bool = False,
    ):
        self._memory, self._row, self._peers = memory, row, peers
        self.update_can_add = update_can_add
        _mapped.append(memory)
        rows = np.frombuffer(memory, np.uint8).reshape(peers.size, row)
        self._parameters = [parameter for bucket in buckets for parameter in bucket]
        self._gradients: List[mx.nd.NDArray] = []
        self._places: List[List[int]] = []  # of each parameter's gradient: its address in each row
        self._buckets: List[_Part] = []
        # Enqueue the sums over nodes, on the first rank of each; None on one node alone.
        self._between: Optional[List[Callable[[], None]]] = None
        start = 0
        for parameters in buckets:
            dtype = np.dtype(parameters[0].list_grad()[0].dtype)
            numbers = sum(parameter.list_grad()[0].size for parameter in parameters)
            stop = start + numbers * dtype.itemsize
            flat = rows[:, start:stop].view(dtype)
            own, start = flat[peers.index], -(-stop // _ALIGNED) * _ALIGNED
            first = len(self._gradients)
            for parameter in parameters:
                old = parameter.list_grad()[0]
                place, own = own[: old.size].reshape(old.shape), own[old.size :]
                place[...] = old.asnumpy()
                offset = place.ctypes.data - rows[peers.index].ctypes.data
                self._places.append([row.ctypes.data + offset for row in rows])
                self._gradients.append(around_memory(place, type(old)))
                set_gradient(parameter, self._gradients[-1])
            self._buckets.append(_Part(flat, _shares(numbers, peers.size), self._gradients[first:]))

    def join_nodes(self, half: Optional[bool], leaders: Any) -> None:
        """Add up over nodes too, through their ``leaders``; for ``half`` see half_sum.summing."""
        self._sums = [around_memory(part.rows[0]) for part in self._buckets]
        self._between = [
            half_sum.summing(array, f"node_gradients.{number}", half, leaders)
            for number, array in enumerate(self._sums if self._peers.index == 0 else [])
        ]

    @property
    def rows_to_add(self) -> int:
        """How many gradients of each parameter :meth:`rows` gives."""
        return self._peers.size if self._between is None else 1

    @staticmethod
    def bytes_of(parameters: List[mx.gluon.Parameter], buckets: int = 2) -> int:
        """Size of a row in bytes, rounded up to whole pages."""
        arrays = [p.list_grad()[0] for p in parameters]
        needed = sum(array.size * np.dtype(array.dtype).itemsize for array in arrays)
        return -(-(needed + buckets * _ALIGNED) // mmap.PAGESIZE) * mmap.PAGESIZE

    def holds(self, parameters: List[mx.gluon.Parameter]) -> bool:
        """Whether exactly these parameters still have their gradients here."""
        own = {id(gradient) for gradient in self._gradients}
        return {id(p.list_grad()[0]) for p in parameters} == own

    def allreduce(self) -> None:
        """Replace every gradient by its sum over ranks."""
        rank = self._peers.index
        if self._between is not None:
            self._sum_over_nodes()
            for part in self._buckets if rank > 0 else []:
                part.rows[rank] = part.rows[0]
        else:
            mx.nd.waitall()  # for backward, and for pending reads of gradients
            self._peers.barrier()
            for part in self._buckets:
                _sum_rows(part.rows, part.shares[rank], part.rows[rank])
            self._peers.barrier()
            for part in self._buckets:
                for other, share in enumerate(part.shares):
                    if other != rank:
                        part.rows[rank, share] = part.rows[other, share]
        self._peers.barrier()  # or the next backward would overwrite what peers still read

    def _sum_over_nodes(self) -> None:
        """Leave the sum over all ranks in the node's first row.

        A bucket is added up on the node as soon as every rank's backward has made it, and goes on
        its way between the nodes while backward makes the next.
        """
        assert self._between is not None
        rank = self._peers.index
        for number, part in enumerate(self._buckets):
            for gradient in part.gradients:
                wait_to_write(gradient)
            self._peers.barrier()
            _sum_rows(part.rows, part.shares[rank], part.rows[0])
            self._peers.barrier()
            if rank == 0:
                self._between[number]()
        for array in self._sums if rank == 0 else []:
            array.wait_to_read()
        self._peers.barrier()

    @contextlib.contextmanager
    def rows(self, indices: Mapping[int, int]) -> Iterator[momentum.Addresses]:
        """All ranks' gradients; ``indices`` is by the ids of parameters. See :func:`rows`."""
        if self._between is None:
            mx.nd.waitall()
            self._peers.barrier()
        else:
            self._sum_over_nodes()
        places = [place[: self.rows_to_add] for place in self._places]
        yield dict(zip([indices[id(p)] for p in self._parameters], places))
        self._peers.barrier()

    def release(self) -> None:
        """Move this rank's gradients out and free their pages.

        The mapping stays, because arrays that the user still holds point into it; they read zeros.
        """
        mx.nd.waitall()
        for parameter, gradient in zip(self._parameters, self._gradients):
            if gradient_or_none(parameter) is gradient:
                set_gradient(parameter, gradient.copy())
        mx.nd.waitall()
        clear_static_graphs(self._parameters)
        self._memory.madvise(mmap.MADV_REMOVE, self._peers.index * self._row, self._row)


def _sum_over_node(values: np.ndarray) -> np.ndarray:
    node = dist.node_process_set()
    if node is None:
        return dist.allreduce_sum(values, "shared_gradients")
    array = mx.nd.array(values, dtype=values.dtype)
    return dist.allreduce_sum_(array, "shared_gradients", node).asnumpy()


_mapped: List[mmap.mmap] = []  # never unmapped: MXNet arrays may still point into them


def _shares(numbers: int, ranks: int) -> List[slice]:
    """The shard of each rank; sizes differ by one at most."""
    ends = [numbers * rank // ranks for rank in range(ranks + 1)]
    return [slice(start, stop) for start, stop in zip(ends, ends[1:])]


@np.errstate(all="ignore")  # a net that diverges is reported by the metrics
def _sum_rows(rows: np.ndarray, share: slice, out: np.ndarray) -> None:
    """Write a shard of the sum of all rows, in row order, to ``out``, which may be one of them.

    One row, of a node with one rank, is ``out`` itself.
    """
    if len(rows) == 1:
        return
    for start in range(share.start, share.stop, _BLOCK):
        block = slice(start, min(start + _BLOCK, share.stop))
        total = rows[0, block]
        for row in rows[1:-1, block]:
            total = total + row
        np.add(total, rows[-1, block], out=out[block])

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
import gc
import mmap
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Tuple,
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
    clear_graph,
    gradient_or_none,
    has_static_graph,
    set_gradient,
)
from . import momentum

_BLOCK = 2**16  # elements: the blocks of all ranks fit into a core's cache
# Ranks; with more, reading all gradients costs more than exchanging sums.
_READ_BY_ALL = momentum.MOST_GRADIENTS
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
        self._fallback: Callable[[], None] = allreduce_of(trainer)
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
            self._shared = _share(trained)
            self._moves_left = self._moves_left - 1 if self._shared is not None else 0
        return self._shared

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
    if dist.world_size() > _READ_BY_ALL or gradients is None:
        return None
    shared = gradients.shared()
    if shared is None or not shared.update_can_add:
        return None
    indices = {id(parameter): index for index, parameter in enumerate(all_parameters(trainer))}
    return shared.rows(indices)


def _share(parameters: List[mx.gluon.Parameter]) -> Optional[_Shared]:
    """Move the gradients into shared memory; None where that is impossible; collective."""
    if not dist.ranks_share_memory():
        return None
    if not all(dense_on_cpu(p.list_grad()[0], np.float32, np.float64) for p in parameters):
        return None
    rank, ranks = dist.rank(), dist.world_size()
    row = _Shared.bytes_of(parameters)
    memory = shared_memory.open_shared(ranks * row, rank, ranks, _sum_over_ranks)
    peers = shared_memory.connect(1, rank, ranks, _sum_over_ranks)
    if memory is None or peers is None:
        return None
    compiled = peers(np.array([momentum.library() is not None], np.int64))
    shared = _Shared(parameters, memory, row, peers, update_can_add=compiled[0] == ranks)
    clear_static_graphs(parameters)
    return shared


class _Shared:
    """Every rank's gradients: one row of bytes per rank, float64 arrays before float32 ones."""

    def __init__(
        self,
        parameters: List[mx.gluon.Parameter],
        memory: mmap.mmap,
        row: int,
        peers: shared_memory.SharedMemorySum,
        update_can_add: bool = False,
    ):
        self._memory, self._row, self._peers = memory, row, peers
        self.update_can_add = update_can_add
        _mapped.append(memory)
        rows = np.frombuffer(memory, np.uint8).reshape(peers.size, row)
        self._parameters: List[mx.gluon.Parameter] = []
        self._gradients: List[mx.nd.NDArray] = []
        self._places: List[List[int]] = []  # of each parameter's gradient: its address in each row
        # For each dtype: (ranks, elements), and the shard of each rank.
        self._flat: List[Tuple[np.ndarray, List[slice]]] = []
        start = 0
        for dtype in (np.float64, np.float32):
            alike = [p for p in parameters if p.list_grad()[0].dtype == dtype]
            numbers = sum(p.list_grad()[0].size for p in alike)
            stop = start + numbers * np.dtype(dtype).itemsize
            flat = rows[:, start:stop].view(dtype)
            own, start = flat[peers.index], stop
            for parameter in alike:
                old = parameter.list_grad()[0]
                place, own = own[: old.size].reshape(old.shape), own[old.size :]
                place[...] = old.asnumpy()
                offset = place.ctypes.data - rows[peers.index].ctypes.data
                self._places.append([row.ctypes.data + offset for row in rows])
                self._gradients.append(around_memory(place, type(old)))
                set_gradient(parameter, self._gradients[-1])
            self._parameters += alike
            self._flat.append((flat, _shares(numbers, peers.size)))

    @staticmethod
    def bytes_of(parameters: List[mx.gluon.Parameter]) -> int:
        """Size of a row in bytes, rounded up to whole pages."""
        arrays = [p.list_grad()[0] for p in parameters]
        needed = sum(array.size * np.dtype(array.dtype).itemsize for array in arrays)
        return -(-needed // mmap.PAGESIZE) * mmap.PAGESIZE

    def holds(self, parameters: List[mx.gluon.Parameter]) -> bool:
        """Whether exactly these parameters still have their gradients here."""
        own = {id(gradient) for gradient in self._gradients}
        return {id(p.list_grad()[0]) for p in parameters} == own

    def allreduce(self) -> None:
        """Replace every gradient by its sum over ranks."""
        mx.nd.waitall()  # for backward, and for pending reads of gradients
        rank = self._peers.index
        self._peers.barrier()
        for flat, shares in self._flat:
            _sum_rows(flat, shares[rank], flat[rank])
        self._peers.barrier()
        for flat, shares in self._flat:
            for other, share in enumerate(shares):
                if other != rank:
                    flat[rank, share] = flat[other, share]
        self._peers.barrier()  # or the next backward would overwrite what peers still read

    @contextlib.contextmanager
    def rows(self, indices: Mapping[int, int]) -> Iterator[momentum.Addresses]:
        """All ranks' gradients; ``indices`` is by the ids of parameters. See :func:`rows`."""
        mx.nd.waitall()
        self._peers.barrier()
        yield {indices[id(p)]: places for p, places in zip(self._parameters, self._places)}
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


_mapped: List[mmap.mmap] = []  # never unmapped: MXNet arrays may still point into them


def _shares(numbers: int, ranks: int) -> List[slice]:
    """The shard of each rank; sizes differ by one at most."""
    ends = [numbers * rank // ranks for rank in range(ranks + 1)]
    return [slice(start, stop) for start, stop in zip(ends, ends[1:])]


@np.errstate(all="ignore")  # a net that diverges is reported by the metrics
def _sum_rows(rows: np.ndarray, share: slice, out: np.ndarray) -> None:
    """Write a shard of the sum of all rows, in row order, to ``out``, which may be one of them."""
    for start in range(share.start, share.stop, _BLOCK):
        block = slice(start, min(start + _BLOCK, share.stop))
        total = rows[0, block]
        for row in rows[1:-1, block]:
            total = total + row
        np.add(total, rows[-1, block], out=out[block])


def clear_static_graphs(parameters: List[mx.gluon.Parameter]) -> None:
    """Drop cached static graphs, which would keep writing to the old gradient arrays.

    A parameter does not know the blocks that use it, so all live blocks are searched.
    """
    moved = set(map(id, parameters))
    for block in gc.get_objects():
        # Not isinstance, which reads obj.__class__: on some proxies that raises.
        is_block = issubclass(type(block), mx.gluon.HybridBlock)
        if is_block and has_static_graph(block):
            own = set(map(id, block.collect_params().values()))
            if moved & own:
                clear_graph(block)


def _sum_over_ranks(values: np.ndarray) -> np.ndarray:
    return dist.allreduce_sum(values, "shared_gradients")

"""The gradients of a node's ranks in the memory that they share, and their sums."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any, Callable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import mxnet as mx
import numpy as np

from ..dist import half_sum, shared_memory
from ..dist.array_memory import Uses, around_memory
from ..mxnet_internals import clear_static_graphs, gradient_or_none, set_gradient, wait_to_write
from . import momentum

_BLOCK = 2**16  # elements: the blocks of all ranks fit into a core's cache
_ALIGNED = 64  # bytes: where a bucket begins


class _Part(NamedTuple):
    """Gradients of one dtype that are added up together."""

    rows: np.ndarray  # (ranks, numbers)
    shares: List[slice]  # the shard of each rank
    gradients: List[mx.nd.NDArray]  # of this rank


class Rows:
    """The gradients of every rank of this node: one row of bytes each, bucket after bucket."""

    def __init__(
        self,
        buckets: Sequence[Sequence[mx.gluon.Parameter]],
        memory: mmap.mmap,
        row: int,
        peers: shared_memory.SharedMemorySum,
        update_can_read: bool = False,
    ):
        self._memory, self._row, self._peers = memory, row, peers
        self.update_can_read = update_can_read
        library = momentum.library()
        self._uses = None if library is None else Uses(library.leave)
        _prune()
        _mapped.append((memory, self._uses))
        rows = np.frombuffer(memory, np.uint8).reshape(peers.size, row)
        self._parameters = [parameter for bucket in buckets for parameter in bucket]
        self._gradients: List[mx.nd.NDArray] = []
        self._sums: List[int] = []  # of each parameter: the address of its gradient's sum
        self._buckets: List[_Part] = []
        # Of several nodes, on the first rank of each: what enqueues the sum of a bucket over them.
        self._between: List[Callable[[], None]] = []
        self._of_nodes: List[mx.nd.NDArray] = []  # of several nodes: the first row of each bucket
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
                self._sums.append(place.ctypes.data - peers.index * row)
                self._gradients.append(around_memory(place, type(old), self._uses))
                set_gradient(parameter, self._gradients[-1])
            self._buckets.append(_Part(flat, _shares(numbers, peers.size), self._gradients[first:]))

    def join_nodes(self, half: Optional[bool], leaders: Any) -> None:
        """Add up over nodes too, through their ``leaders``; for ``half`` see half_sum.summing."""
        self._of_nodes = [around_memory(part.rows[0], uses=self._uses) for part in self._buckets]
        self._between = [
            half_sum.summing(array, f"node_gradients.{number}", half, leaders)
            for number, array in enumerate(self._of_nodes if self._peers.index == 0 else [])
        ]

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
        with self.summed({}):
            for part in self._buckets if self._peers.index > 0 else []:
                part.rows[self._peers.index] = part.rows[0]

    @contextlib.contextmanager
    def summed(self, indices: Mapping[int, int]) -> Iterator[momentum.Addresses]:
        """Sums over ranks, in the first row; ``indices`` is by the ids of parameters.

        A bucket is added up on the node as soon as every rank's backward has made it, and goes on
        its way between the nodes while backward makes the next.
        """
        rank = self._peers.index
        for number, part in enumerate(self._buckets):
            for gradient in part.gradients:
                wait_to_write(gradient)
            self._peers.barrier()
            sum_rows(part.rows, part.shares[rank])
            self._peers.barrier()
            if self._between:
                self._between[number]()
        for array in self._of_nodes if rank == 0 else []:
            array.wait_to_read()
        if self._of_nodes:
            self._peers.barrier()
        yield {indices[id(p)]: place for p, place in zip(self._parameters, self._sums) if indices}
        self._peers.barrier()  # or the next backward would overwrite what peers still read

    def release(self) -> None:
        """Move this rank's gradients out and free their pages; not to be used any more.

        The mapping stays while arrays that the user still holds point into it; they read zeros.
        """
        mx.nd.waitall()
        for parameter, gradient in zip(self._parameters, self._gradients):
            if gradient_or_none(parameter) is gradient:
                set_gradient(parameter, gradient.copy())
        mx.nd.waitall()
        clear_static_graphs(self._parameters)
        self._memory.madvise(mmap.MADV_REMOVE, self._peers.index * self._row, self._row)
        self._gradients, self._buckets, self._of_nodes, self._between = [], [], [], []
        del gradient, self._memory
        _prune()


# While MXNet's arrays may still point there; for good, where nothing counts them.
_mapped: List[Tuple[mmap.mmap, Optional[Uses]]] = []


def _prune() -> None:
    """Let go of what no array points into; runs that end by an exception leave that to the next."""
    _mapped[:] = [(memory, uses) for memory, uses in _mapped if uses is None or uses]


def _shares(numbers: int, ranks: int) -> List[slice]:
    """The shard of each rank; sizes differ by one at most."""
    ends = [numbers * rank // ranks for rank in range(ranks + 1)]
    return [slice(start, stop) for start, stop in zip(ends, ends[1:])]


@np.errstate(all="ignore")  # a net that diverges is reported by the metrics
def sum_rows(rows: np.ndarray, share: slice) -> None:
    """Replace a shard of the first row by the sum of all rows, in row order."""
    for start in range(share.start, share.stop, _BLOCK):
        block = slice(start, min(start + _BLOCK, share.stop))
        total = rows[0, block]
        for row in rows[1:, block]:
            np.add(total, row, out=total)

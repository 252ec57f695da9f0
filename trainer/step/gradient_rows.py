"""The gradients of a node's ranks in the memory that they share, and their sums."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any, Callable, Iterator, List, Mapping, NamedTuple, Optional, Sequence

import mxnet as mx
import numpy as np

from ..dist import half_sum, shared_memory
from ..dist.array_memory import around_memory
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
                sum_rows(part.rows, part.shares[rank], part.rows[rank])
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
            sum_rows(part.rows, part.shares[rank], part.rows[0])
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


_mapped: List[mmap.mmap] = []  # never unmapped: MXNet arrays may still point into them


def _shares(numbers: int, ranks: int) -> List[slice]:
    """The shard of each rank; sizes differ by one at most."""
    ends = [numbers * rank // ranks for rank in range(ranks + 1)]
    return [slice(start, stop) for start, stop in zip(ends, ends[1:])]


@np.errstate(all="ignore")  # a net that diverges is reported by the metrics
def sum_rows(rows: np.ndarray, share: slice, out: np.ndarray) -> None:
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

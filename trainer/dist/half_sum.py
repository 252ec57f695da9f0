"""Allreduce of float32 arrays that crosses the network in float16, at half the bytes.

Each rank rounds its array, sends each other rank its shard, adds up the shards that it gets in
float32, and sends the sum to all: a reduce-scatter and an allgather, as Horovod's ring has them,
but in two roundings whatever the number of ranks, and without Gloo's sum of float16, which takes
longer than the network. The casts are in C++ (native/halves.cc) and run in MXNet's engine, when
what they need is there. Without a compiler, F16C or on GPUs MXNet casts and Horovod sums.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Callable, Optional

import mxnet as mx
import numpy as np

from ..mxnet_internals import C_LIBRARY, push
from ..native import compile
from . import environment
from .array_memory import dense_on_cpu
from .collectives import allreduce_sum_, any_rank
from .ranks import horovod, world_size

_AT_ONCE = 8  # numbers


@functools.lru_cache(maxsize=None)
def library() -> Optional[ctypes.CDLL]:
    """The compiled functions; None where they cannot be compiled, or this CPU lacks F16C."""
    found = compile.load(
        "halves", "gradients are cast by MXNet's kernels", environment.local_rank() == 0
    )
    if found is None or not found.supported():
        return None
    found.new_task.restype = ctypes.c_void_p
    names = ("MXNDArrayGetData", "MXShallowCopyNDArray", "MXNDArrayFree")
    found.load_interface(*(ctypes.cast(getattr(C_LIBRARY, n), ctypes.c_void_p) for n in names))
    return found


def everywhere() -> bool:
    """Whether the functions are compiled on every rank; collective."""
    return not any_rank(library() is None, "half_sum")


def summing(
    array: mx.nd.NDArray, name: str, half: Optional[bool], process_set: Any = None
) -> Callable[[], None]:
    """What replaces ``array`` by its sum over the ranks of a process set, asynchronously.

    Args:
        half: None leaves it as wide as it is; otherwise :func:`everywhere`.
    """
    if half is None or np.dtype(array.dtype).itemsize <= np.dtype(np.float16).itemsize:
        return lambda: allreduce_sum_(array, name, process_set)
    return HalfSum(array, name, half, process_set)


class HalfSum:
    """Of one flat array, whose size is a multiple of 8.

    The name tells its messages from others in flight; collective, as is every method.
    """

    def __init__(self, array: mx.nd.NDArray, name: str, compiled: bool, process_set: Any = None):
        """``compiled``: whether :func:`library` is there on every rank."""
        self._array, self._name, self._process_set = array, name, process_set
        self._ranks = world_size() if process_set is None else process_set.size()
        self._compiled = compiled and dense_on_cpu(array, np.float32)
        unit = _AT_ONCE * self._ranks
        padded = -(-array.size // unit) * unit if self._compiled else array.size
        self._half, self._shards = (
            mx.nd.zeros((padded,), ctx=array.context, dtype="float16") for _ in range(2)
        )
        self._sum = mx.nd.zeros((padded // self._ranks,), dtype="float16")

    def __call__(self) -> None:
        """Replace the array by its sum over ranks, asynchronously; collective."""
        if not self._compiled:
            mx.nd.cast(self._array, dtype="float16", out=self._half)
            allreduce_sum_(self._half, self._name, self._process_set)
            mx.nd.cast(self._half, dtype=np.dtype(self._array.dtype).name, out=self._array)
            return
        whole, shard = self._array.size, self._sum.size
        self._run("round_to_half", self._array, self._half, whole)
        _alltoall(self._half, self._shards, f"{self._name}.shards", self._process_set)
        self._run("sum_rows", self._shards, self._sum, shard, self._ranks)
        _allgather(self._sum, self._half, f"{self._name}.sums", self._process_set)
        self._run("widen", self._half, self._array, whole)

    def _run(self, function: str, source: Any, target: Any, numbers: int, rows: int = 1) -> None:
        compiled: Any = library()
        task = compiled.new_task(source.handle, target.handle, ctypes.c_int64(numbers), rows)
        push(getattr(compiled, function), task, compiled.free_task, source, target)


def _enqueue(collective: str, *given: Any) -> None:
    from horovod.mxnet.mpi_ops import MPI_MXNET_LIB_CTYPES as LIBRARY

    mx.base.check_call(getattr(LIBRARY, f"horovod_mxnet_{collective}_async")(*given))


def _alltoall(array: Any, out: Any, name: str, process_set: Any = None) -> None:
    """Write the n-th part of every rank's flat ``array``, for this rank n, to ``out``.

    Asynchronous, unlike Horovod's own function, so that both arrays must stay alive; they are alike
    and a multiple of the number of ranks long.
    """
    process_set = horovod().global_process_set if process_set is None else process_set
    even = mx.nd.array([], dtype="int32")
    received = mx.nd.empty((process_set.size(),), dtype="int32")
    given = array.handle, out.handle, mx.base.c_str(name), even.handle, received.handle
    _enqueue("alltoall", *given, 0, process_set.process_set_id)


def _allgather(array: Any, out: Any, name: str, process_set: Any = None) -> None:
    """Write every rank's flat ``array``, one after the other, to ``out``; see :func:`_alltoall`."""
    number = 0 if process_set is None else process_set.process_set_id
    own, every = ctypes.byref(array.handle), ctypes.byref(out.handle)
    _enqueue("allgather", own, every, mx.base.c_str(name), 0, number, 1)

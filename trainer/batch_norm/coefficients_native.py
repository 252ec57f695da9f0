"""The operator of :mod:`coefficients` in C++, for arrays on the CPU.

It computes the same sums and writes the same outputs, but runs no Python in a step. Where the one
in Python is used instead: docs/batch_norm.md.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import traceback
import weakref
from typing import Any, Optional

import mxnet as mx
import numpy as np

from ..dist import environment
from ..dist.shared_memory import LostPeerError, SharedMemorySum
from ..mxnet_internals import C_LIBRARY
from ..native import compile
from . import coefficients
from .rank_sum import SWITCH, RankSum, registry

OP_TYPE = "sync_batch_norm_coefficients_native"

_PythonSum = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_double), ctypes.c_int
)
_Look = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int64)


class _Interface(ctypes.Structure):
    """The functions and variables that C++ uses; see ``Interface`` in native/interface.h."""

    _fields_ = (
        ("get_data", ctypes.c_void_p),
        ("get_shape", ctypes.c_void_p),
        ("get_dtype", ctypes.c_void_p),
        ("free_array", ctypes.c_void_p),
        ("python_sum", _PythonSum),
        ("look", _Look),
        ("batch_is_empty", ctypes.c_void_p),
        ("nanoseconds", ctypes.c_void_p),
    )


def seconds_of_sums() -> float:
    """Seconds that all sums of this process have taken, waiting for other ranks included."""
    return registry.seconds + 1e-9 * registry.nanoseconds.value


def operator_type(rank_sum: RankSum, device: mx.Context) -> str:
    """The ``op_type`` of the Custom operator for a layer's ``rank_sum``; it never changes."""
    if rank_sum.operator_type is None:
        wanted = os.environ.get(SWITCH, "1") == "1" and rank_sum.collected is None
        native = wanted and device.device_type == "cpu" and _load() is not None
        rank_sum.operator_type = OP_TYPE if native else coefficients.OP_TYPE
        if native:
            registry.kept[rank_sum.serial] = rank_sum
    return rank_sum.operator_type


@functools.lru_cache(maxsize=None)
def _load() -> Optional[ctypes.CDLL]:
    library = compile.load(
        "batch_norm", "sync batch norm runs in Python", environment.local_rank() == 0
    )
    if library is None:
        return None
    names = ("MXNDArrayGetData", "MXNDArrayGetShapeEx", "MXNDArrayGetDType", "MXNDArrayFree")
    functions = [ctypes.cast(getattr(C_LIBRARY, name), ctypes.c_void_p) for name in names]
    library.load.restype = ctypes.c_void_p
    numbers = registry.batch_is_empty, registry.nanoseconds
    interface = _Interface(*functions, _python_sum, _look, *map(ctypes.addressof, numbers))
    creator = library.load(ctypes.byref(interface))
    mx.base.check_call(C_LIBRARY.MXCustomOpRegister(OP_TYPE.encode(), ctypes.c_void_p(creator)))
    return library


@_PythonSum
def _python_sum(serial: int, numbers: Any, count: int) -> int:
    """The sums that C++ cannot do: a RankSum's first, and all of them without shared memory."""
    try:
        rank_sum = registry.alive[serial]
        values = np.ctypeslib.as_array(numbers, (count,))
        values[:] = rank_sum(values)
        if rank_sum.shared is not None:
            share(rank_sum, rank_sum.shared)
    except Exception as error:
        return _failed(error)
    return 1


@_Look
def _look(serial: int, calls: int) -> int:
    """Called from a sum in C++ that has waited for long, its ``calls``-th; 0 if a peer has died."""
    rank_sum = registry.alive.get(serial)
    if rank_sum is None or rank_sum.shared is None:
        return 1  # its layer is gone
    try:
        rank_sum.shared.calls = calls
        rank_sum.shared.check_peers()
    except RuntimeError as error:
        return _failed(error)
    return 1


def _failed(error: Exception) -> int:
    if isinstance(error, LostPeerError):
        registry.lost = str(error)
    if not isinstance(error, RuntimeError):
        traceback.print_exc()
    print(f"sync batch norm: {error}", file=sys.stderr, flush=True)
    return 0


def share(rank_sum: RankSum, shared: SharedMemorySum) -> None:
    """Have C++ do the further sums of a RankSum, through its shared memory."""
    library = _load()
    assert library is not None
    calls, shape = ctypes.c_int64(shared.calls), (shared.index, shared.size, shared.capacity)
    channel, stream = shared.beyond or (None, 0)
    beyond = channel and channel.handle, stream
    one_node = int(shared.beyond is None)
    library.share(rank_sum.serial, shared.fileno(), calls, *shape, one_node, *beyond)
    if rank_sum.unshare is None:
        weakref.finalize(rank_sum, library.forget, rank_sum.serial)
    rank_sum.unshare = functools.partial(library.unshare, rank_sum.serial)
    registry.kept.pop(rank_sum.serial, None)

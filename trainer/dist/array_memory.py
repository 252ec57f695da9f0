"""Creates arrays on a device from host data, and gives access to the memory of CPU arrays."""

from __future__ import annotations

import ctypes
from typing import Any, Callable, ClassVar, Optional, Tuple

import mxnet as mx
import numpy as np
from mxnet.base import NDArrayHandle, check_call

from ..mxnet_internals import C_LIBRARY

Shape = Tuple[int, ...]
Fill = Callable[[np.ndarray], Any]  # writes every element of the given float32 array
Place = Callable[[Shape, Fill], Any]  # allocates a float32 array of a shape and fills it


def on_host(shape: Shape, fill: Fill) -> np.ndarray:
    """Make a NumPy array."""
    array = np.empty(shape, np.float32)
    fill(array)
    return array


def on_device(ctx: mx.Context) -> Place:
    """Make MXNet arrays on ``ctx``; on the CPU they are filled in place, without a copy."""

    def in_memory(shape: Shape, fill: Fill) -> mx.nd.NDArray:
        array = mx.nd.empty(shape, ctx=ctx)
        # The engine has no pending work on a new array, so there is nothing to wait for.
        fill(memory_of(array))
        return array

    if ctx.device_type == "cpu":
        return in_memory
    return lambda shape, fill: mx.nd.array(on_host(shape, fill), ctx=ctx)


def memory_of(array: mx.nd.NDArray) -> np.ndarray:
    """A view of a CPU array's memory, converted from oneDNN's layout to row-major if necessary.

    It must not outlive ``array``, nor be used while the engine works on the array.
    """
    size = array.size * np.dtype(array.dtype).itemsize
    memory = (ctypes.c_char * size).from_address(address_of(array))
    return np.frombuffer(memory, array.dtype).reshape(array.shape)


def address_of(array: mx.nd.NDArray) -> int:
    """Where the memory of :func:`memory_of` begins; 0 if it is empty."""
    address = ctypes.c_void_p()
    check_call(C_LIBRARY.MXNDArrayGetData(array.handle, ctypes.byref(address)))
    return address.value or 0


def dense_on_cpu(array: mx.nd.NDArray, *dtypes: type) -> bool:
    """Whether ``array`` is dense, on the CPU and of one of ``dtypes``."""
    on_cpu = array.context.device_type == "cpu"
    return on_cpu and array.stype == "default" and array.dtype in dtypes


class _Tensor(ctypes.Structure):
    """DLPack's DLTensor, version 0.2, as in MXNet 1.9."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int),
        ("device_id", ctypes.c_int),
        ("dimensions", ctypes.c_int),
        ("type_code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class _ManagedTensor(ctypes.Structure):
    """DLPack's DLManagedTensor."""

    _fields_: ClassVar = [
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class Uses:
    """How many arrays there are around some memory, however their users have split and kept them.

    MXNet's ``from_numpy`` would keep the memory alive, but by calling Python from engine threads,
    possibly after Python has exited. Here they count down in C: ``leave`` is DLPack's deleter,
    which subtracts one from the number that it is given.
    """

    def __init__(self, leave: Any):
        self._number, self.leave = ctypes.c_int64(0), ctypes.cast(leave, ctypes.c_void_p)

    def __bool__(self) -> bool:
        return self._number.value > 0

    def enter(self) -> int:
        """Count one more; the address of the number."""
        self._number.value += 1
        return ctypes.addressof(self._number)


def around_memory(
    memory: np.ndarray, kind: type = mx.nd.NDArray, uses: Optional[Uses] = None
) -> Any:
    """An MXNet array that shares ``memory``, float32 or float64, without a copy.

    ``memory`` and ``uses``, if it is counted there, must stay alive for as long as MXNet may use
    the array.
    """
    cpu, floating = 1, 2
    address, bits = memory.ctypes.data, 8 * memory.itemsize
    shape = (ctypes.c_int64 * memory.ndim)(*memory.shape)
    tensor = _Tensor(address, cpu, 0, memory.ndim, floating, bits, 1, shape)
    handle = NDArrayHandle()
    managed, copied = _ManagedTensor(tensor), ctypes.c_bool(True)
    if uses is not None:
        managed.context, managed.deleter = uses.enter(), uses.leave
    check_call(C_LIBRARY.MXNDArrayFromDLPackEx(ctypes.byref(managed), copied, ctypes.byref(handle)))
    return kind(handle=handle)


def take_memory(array: mx.nd.NDArray, view: mx.nd.NDArray) -> None:
    """Have ``array`` lie where ``view`` does, which already holds its value.

    Whoever has the object sees no difference. A weight forgets its gradient: see
    ``mxnet_internals.set_gradient``.
    """
    array.handle, view.handle = view.handle, array.handle

"""Arrays on a device, written from the host; and the memory of those on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any, Callable, ClassVar, Tuple

import mxnet as mx
import numpy as np
from mxnet.base import _LIB, NDArrayHandle, check_call

Shape = Tuple[int, ...]
Fill = Callable[[np.ndarray], Any]  # writes every number of the float32 array that it is given
Place = Callable[[Shape, Fill], Any]  # makes an array of a shape and has it filled


def on_host(shape: Shape, fill: Fill) -> np.ndarray:
    """A NumPy array."""
    array = np.empty(shape, np.float32)
    fill(array)
    return array


def on_device(ctx: mx.Context) -> Place:
    """MXNet arrays on ``ctx``; on the CPU written where they stay, without a copy."""

    def in_memory(shape: Shape, fill: Fill) -> mx.nd.NDArray:
        array = mx.nd.empty(shape, ctx=ctx)
        # Nothing in MXNet's engine knows of the array yet, so nothing need be waited for.
        fill(memory_of(array))
        return array

    def by_copy(shape: Shape, fill: Fill) -> mx.nd.NDArray:
        return mx.nd.array(on_host(shape, fill), ctx=ctx)

    return in_memory if ctx.device_type == "cpu" else by_copy


def memory_of(array: mx.nd.NDArray) -> np.ndarray:
    """A view of a CPU array's memory, brought into the order of its shape if oneDNN had another.

    It must not outlive ``array``.
    """
    address = ctypes.c_void_p()
    check_call(_LIB.MXNDArrayGetData(array.handle, ctypes.byref(address)))
    size = array.size * np.dtype(array.dtype).itemsize
    memory = (ctypes.c_char * size).from_address(address.value or 0)
    return np.frombuffer(memory, array.dtype).reshape(array.shape)


def dense_on_cpu(array: mx.nd.NDArray, *dtypes: type) -> bool:
    """Whether it is a dense array on the CPU, of one of ``dtypes``."""
    on_cpu = array.context.device_type == "cpu"
    return on_cpu and array.stype == "default" and array.dtype in dtypes


class _Tensor(ctypes.Structure):
    """DLPack's DLTensor, of version 0.2, which MXNet 1.9 has."""

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


def around_memory(memory: np.ndarray, kind: type = mx.nd.NDArray) -> Any:
    """An array of MXNet's over ``memory``, float32 or float64, without a copy.

    ``memory`` must be kept for as long as anything of MXNet's may hold the array. MXNet's own
    ``from_numpy`` would see to that, by Python called from the engine's threads, which may come
    when Python has ended.
    """
    cpu, floating = 1, 2
    tensor = _Tensor(
        memory.ctypes.data,
        cpu,
        0,
        memory.ndim,
        floating,
        8 * memory.itemsize,
        1,
        (ctypes.c_int64 * memory.ndim)(*memory.shape),
    )
    handle = NDArrayHandle()
    managed, copied = _ManagedTensor(tensor), ctypes.c_bool(True)
    check_call(_LIB.MXNDArrayFromDLPackEx(ctypes.byref(managed), copied, ctypes.byref(handle)))
    return kind(handle=handle)

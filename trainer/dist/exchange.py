"""Horovod's alltoall and allgather of arrays, as operators that the host does not wait for."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from .ranks import horovod

if TYPE_CHECKING:
    import mxnet as mx


def alltoall_(
    array: mx.nd.NDArray, out: mx.nd.NDArray, name: str, process_set: Any = None
) -> None:
    """Write the n-th part of every rank's flat ``array``, for this rank n, to ``out``.

    Asynchronous, unlike Horovod's own function, so that both arrays must stay alive; they are alike
    and a multiple of the number of ranks long.
    """
    import mxnet as mx
    from horovod.mxnet.mpi_ops import MPI_MXNET_LIB_CTYPES as library

    process_set = horovod().global_process_set if process_set is None else process_set
    even = mx.nd.array([], dtype="int32")
    received = mx.nd.empty((process_set.size(),), dtype="int32")
    mx.base.check_call(
        library.horovod_mxnet_alltoall_async(
            array.handle,
            out.handle,
            mx.base.c_str(name),
            even.handle,
            received.handle,
            0,
            process_set.process_set_id,
        )
    )


def allgather_(
    array: mx.nd.NDArray, out: mx.nd.NDArray, name: str, process_set: Any = None
) -> None:
    """Write every rank's flat ``array``, one after the other, to ``out``; see :func:`alltoall_`."""
    import mxnet as mx
    from horovod.mxnet.mpi_ops import MPI_MXNET_LIB_CTYPES as library

    number = 0 if process_set is None else process_set.process_set_id
    own, every = ctypes.byref(array.handle), ctypes.byref(out.handle)
    mx.base.check_call(
        library.horovod_mxnet_allgather_async(own, every, mx.base.c_str(name), 0, number, 1)
    )

"""Which device a rank computes on, and how many threads it may use there."""

from __future__ import annotations

import os
from typing import Any, Optional

from . import dist
from .settings import ConfigError


def limit_threads() -> None:
    """Share the node's cores among its ranks, unless the user said otherwise.

    OpenMP reads its variable once, when MXNet is loaded: call this before importing it.
    """
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // dist.launched_local_size())))


def choose(device: str, local_rank: int, gpus: Optional[int] = None) -> Any:
    """The MXNet context for ``device``: ``auto``, ``cpu`` or ``gpu``.

    Args:
        local_rank: ranks of a node take its GPUs in turn; where the launcher shows each rank only
            its own, that is GPU 0 for all of them.
        gpus: how many this process sees; None asks the driver.

    Raises:
        ConfigError: a GPU was asked for and there is none, or this MXNet cannot compute on it.
    """
    import mxnet as mx

    if device == "cpu":
        return mx.cpu()
    if gpus is None:
        try:
            gpus = mx.context.num_gpus()
        except mx.MXNetError:  # a CUDA build on a machine without a driver
            gpus = 0
    if gpus == 0:
        if device == "auto":
            return mx.cpu()
        raise ConfigError(
            "device is gpu; MXNet sees none. Install requirements-gpu.txt (`make setup GPU=1`) and "
            "look at `python -m launch doctor`, or set device=cpu"
        )
    if dist.local_size() > gpus > 1:
        raise ConfigError(
            f"{dist.local_size()} ranks on this node, {gpus} GPUs; start at most one rank a GPU"
        )
    context = mx.gpu(local_rank % gpus)
    try:
        mx.nd.ones((1,), ctx=context).wait_to_read()
    except mx.MXNetError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"{context} cannot be used by this MXNet ({reason}); builds of 1.9.1 from PyPI hold "
            "code for compute capability 5.0 to 8.9, for newer GPUs use NVIDIA's NGC container"
        ) from error
    return context

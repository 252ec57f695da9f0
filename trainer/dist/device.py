"""Which device a rank computes on, and how many threads it may use there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Optional, Set, Tuple

from launch.core.cpu_quota import quota_cores

from ..errors import ConfigError
from . import environment
from .ranks import local_size


def share_cores() -> None:
    """Divide the node's cores among its ranks: set this rank's thread count and CPU affinity.

    A container's CPU quota counts as that many cores. OMP_NUM_THREADS is kept if the user has set
    it; with OMP_PROC_BIND set, to anything, the affinity stays as it is. Call this before importing
    MXNet: OpenMP reads its variables when it is loaded, and threads inherit the affinity of the
    thread that creates them.
    """
    ranks, allowed = environment.local_size(), os.sched_getaffinity(0)
    cores = min(len(allowed), quota_cores() or len(allowed))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    threads = os.environ["OMP_NUM_THREADS"]
    if ranks > 1 and threads.isdigit() and "OMP_PROC_BIND" not in os.environ:
        own = own_cores(allowed, environment.local_rank(), ranks, int(threads))
        os.sched_setaffinity(0, own)


def own_cores(allowed: Set[int], local_rank: int, ranks: int, threads: int) -> Set[int]:
    """The logical CPUs, out of those ``allowed``, to which a rank is bound.

    All of them if they are fewer than the threads of all ranks: then ranks share CPUs, or their
    launcher (Slurm, mpirun) has bound each already.
    """
    if ranks * threads > len(allowed):
        return allowed
    # Hyperthreads of one core are neighbours in this order, so that ranks do not share cores.
    ordered = sorted(allowed, key=lambda cpu: (*_physical_core(cpu), cpu))
    share = len(ordered) // ranks
    return set(ordered[local_rank * share : (local_rank + 1) * share])


def _physical_core(cpu: int) -> Tuple[int, int]:
    """(package, core) as numbered by Linux; (0, cpu) where unknown, as in some containers."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        package, core = (
            int((topology / name).read_text()) for name in ("physical_package_id", "core_id")
        )
    except (OSError, ValueError):
        return 0, cpu
    return package, core


def choose(device: str, local_rank: int, gpus: Optional[int] = None) -> Any:
    """The MXNet context for ``device``: ``auto``, ``cpu`` or ``gpu``.

    Args:
        local_rank: selects the GPU; always GPU 0 where the launcher makes only one visible.
        gpus: number of visible GPUs; None asks the driver.

    Raises:
        ConfigError: no GPU is visible although one was asked for, there are fewer than ranks, or
            this MXNet cannot compute on it.
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
    if local_size() > gpus > 1:
        raise ConfigError(
            f"{local_size()} ranks on this node, {gpus} GPUs; start at most one rank a GPU"
        )
    context = mx.gpu(local_rank % gpus)
    try:
        mx.nd.ones((1,), ctx=context).wait_to_read()
    except mx.MXNetError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"{context} cannot be used by this MXNet ({reason}); builds of 1.9.1 from PyPI run "
            "on compute capability 5.0 to 8.9, for newer GPUs use NVIDIA's NGC container"
        ) from error
    return context

"""Which device a rank computes on, and how many threads it may use there."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Any, Optional, Set, Tuple

from launch.core.cpu_quota import quota_cores

from ..console import warn
from ..errors import ConfigError
from . import environment
from .ranks import last_line, local_size, visible_gpus

# Where one is set, each rank may have been given GPUs of its own.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")


def share_cores() -> None:
    """Divide the node's cores among its ranks: set this rank's thread count and CPU affinity.

    A container's CPU quota counts as that many cores. OMP_NUM_THREADS is kept if the user has set
    it; with OMP_PROC_BIND set, to anything, the affinity stays as it is. Call this before importing
    MXNet: OpenMP reads its variables when it is loaded, and threads inherit the affinity of the
    thread that creates them. Raises LaunchError for a count in the environment that is no number,
    and a limit that is too low.
    """
    environment.check_counts()
    environment.check_addresses()
    ranks, allowed = environment.local_size(), os.sched_getaffinity(0)
    cores = min(len(allowed), quota_cores() or len(allowed))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    threads = os.environ["OMP_NUM_THREADS"]
    if ranks > 1 and "OMP_PROC_BIND" not in os.environ:
        own = own_cores(allowed, environment.local_rank(), ranks, int(threads))
        os.sched_setaffinity(0, own)


def tell_of_threads() -> None:
    """Warn, once per node, where the ranks of a node compute with all of its cores each."""
    ranks, cores = environment.local_size(), len(os.sched_getaffinity(0))
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ and environment.local_rank() == 0:
        warn(
            f"OMP_NUM_THREADS is not set, and MXNet was imported first: each of {ranks} ranks "
            f"computes with {cores} threads; import trainer before mxnet, which divides the cores, "
            f"or set OMP_NUM_THREADS={max(1, cores // ranks)}"
        )


def cores() -> int:
    """The cores that this rank may use: those that it is bound to, or its share of a CPU quota."""
    bound, quota = len(os.sched_getaffinity(0)), quota_cores()
    return bound if quota is None else min(bound, max(1, quota // environment.local_size()))


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
    with contextlib.suppress(OSError, ValueError):
        package = int((topology / "physical_package_id").read_text())
        return package, int((topology / "core_id").read_text())
    return 0, cpu


def choose(device: str, local_rank: int, gpus: Optional[int] = None) -> Any:
    """The MXNet context for ``device``: ``auto``, ``cpu`` or ``gpu``.

    Args:
        local_rank: selects among the visible GPUs: those of all ranks of the node, in turn, or
            this rank's own, where its launcher has made only these visible (Slurm's
            ``--gpus-per-task``). :func:`pci_address` tells whether ranks share one.
        gpus: number of visible GPUs; None asks the driver.

    Raises:
        ConfigError: no GPU is visible although one was asked for, there are fewer than ranks, this
            MXNet cannot compute on it, or its driver is broken, which CPUs do not survive either.
    """
    import mxnet as mx

    if gpus is None:
        gpus = visible_gpus()
    if device == "cpu":
        return mx.cpu()
    if gpus == 0:
        if device == "auto":
            if environment.rank() == 0 and mx.runtime.Features().is_enabled("CUDA"):
                warn("MXNet is a CUDA build and sees no GPU: training on the CPU")
            return mx.cpu()
        raise ConfigError(
            "device is gpu; MXNet sees none. Install requirements-gpu.txt (`make setup GPU=1`) and "
            "look at `python -m launch doctor`, or set device=cpu"
        )
    if local_size() > gpus and not any(os.environ.get(name) for name in _VISIBLE):
        raise ConfigError(
            f"{local_size()} ranks on this node, {gpus} GPUs; start at most one rank per GPU "
            f"(`make train RANKS={gpus}`), or set device=cpu"
        )
    context = mx.gpu(local_rank % gpus)
    try:
        mx.nd.ones((1,), ctx=context).wait_to_read()
    except mx.MXNetError as error:
        raise ConfigError(
            f"{context} cannot be used by this MXNet ({last_line(error)}); builds of 1.9.1 from "
            "PyPI run on compute capability 5.0 to 8.9, for newer GPUs use NVIDIA's NGC container"
        ) from error
    _fuse_if_possible()
    return context


def _fuse_if_possible() -> None:
    """Before MXNet compiles a net: in PTX of CUDA 11.8, which older drivers cannot read."""
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        if not failed and version.value < 11080:
            os.environ.setdefault("MXNET_USE_FUSION", "0")


def pci_address(context: Any) -> str:
    """The PCI address of a GPU, by which NCCL tells GPUs apart; empty for a CPU, or if unknown."""
    if context.device_type != "gpu":
        return ""
    address = ctypes.create_string_buffer(32)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDeviceGetPCIBusId(address, 32, context.device_id)
    except (OSError, AttributeError):
        return ""
    return "" if failed else address.value.decode()

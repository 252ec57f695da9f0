"""This process's place among the ranks, read from its launcher's environment variables.

It needs no library. A process without a launcher is rank 0 of 1. Variables that no launcher has set
are refused (:func:`check`), because Horovod would wait for ranks that do not exist.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from typing import Optional, Tuple

from ..errors import UserError, show

# Set by horovodrun and `python -m launch`, mpirun, other MPIs, and a bare srun, in this order.
_SIZE = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_RANK = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_LOCAL_SIZE = ("HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_LOCAL_RANK = ("HOROVOD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")

# At least one is set by every launcher through which ranks can find each other.
_RENDEZVOUS = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")

# Where one is no number, MXNet ends the process, or Horovod and libgomp make up another.
_COUNTS = ("OMP_NUM_THREADS", "MXNET_CPU_WORKER_NTHREADS", "HOROVOD_GLOO_TIMEOUT_SECONDS")

_ADDRESSES = 2_000_000 * 1024  # bytes; with less, all but the tiniest net crashes in its first step


class LaunchError(UserError):
    """Variables in the environment are wrong; printed by every process, whatever its rank."""


class NotJoinedError(ValueError):
    """Processes started as ranks of one job have not found each other."""

    def __init__(self, started: int, joined: int):
        super().__init__(
            f"{started} processes were started, but Horovod joins only {joined}, so that each would"
            " train a model of its own: under srun put `python -m launch slurm-rank --` before the "
            "command; in place of mpirun, which needs a Horovod built with MPI, use "
            f"`horovodrun -np {started}` or `python -m launch local -n {started} --`"
        )


def check() -> None:
    """Refuse HOROVOD_SIZE or HOROVOD_RANK if no launcher has set it, with a LaunchError."""
    alone = size() == 1 and rank() == 0
    if alone or any(variable in os.environ for variable in _RENDEZVOUS):
        return
    names = [v for v in ("HOROVOD_SIZE", "HOROVOD_RANK") if v in os.environ]
    if names:
        raise LaunchError(
            f"{' and '.join(f'{v}={os.environ[v]}' for v in names)} in the environment, without "
            f"{_RENDEZVOUS[0]}, which launchers set as well: to train on one process, `unset "
            f"{' '.join(names)}`; on several, put `horovodrun -np N` or `python -m launch local "
            "-n N --` before the command"
        )


def check_counts() -> None:
    """Refuse counts that are no whole numbers from 1: LaunchError; before MXNet is imported."""
    for variable in _COUNTS:
        _first_set((variable,), 1, least=1)


def check_addresses() -> None:
    """Refuse a ``ulimit -v`` below two gigabytes, in which MXNet would crash; before its import.

    Raises LaunchError.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < _ADDRESSES:
        raise LaunchError(
            f"`ulimit -v` allows {limit // 1024} kB of addresses; MXNet's libraries and a net take "
            f"{_ADDRESSES // 1024} or more, most of which is no memory: `ulimit -v unlimited`"
        )


def _first_set(variables: Tuple[str, ...], default: int, least: int = 0) -> int:
    for variable in variables:
        value = os.environ.get(variable)
        if value is None:
            continue
        if not re.fullmatch("[0-9]{1,6}", value) or int(value) < least:
            raise LaunchError(
                f"{variable} is {show(value)}; it must be a whole number from {least} to 999999: "
                f"correct it, or `unset {variable}`"
            )
        return int(value)
    return default


def size() -> int:
    """The number of ranks; 1 without a launcher, as in a shell on the terminal of `srun --pty`."""
    shell = "SLURM_PTY_PORT" in os.environ and any(map(os.isatty, range(3)))
    return _first_set(_SIZE[:2] if shell else _SIZE, 1, least=1)


def rank() -> int:
    """The rank of this process; 0 without a launcher."""
    return _first_set(_RANK, 0)


def local_size() -> int:
    """The number of ranks on this node; 1 without a launcher."""
    return _first_set(_LOCAL_SIZE, 1, least=1)


def local_rank() -> int:
    """The rank of this process on its node; 0 without a launcher."""
    return _first_set(_LOCAL_RANK, 0)


def threads() -> int:
    """The cores of this rank, once device.share_cores has divided them; elsewhere a guess, 4."""
    return _first_set(("OMP_NUM_THREADS",), 4, least=1)


def one_rank_per_node() -> bool:
    """Whether each node has one rank; on every rank the same, where the launcher tells."""
    return _first_set(("HOROVOD_CROSS_SIZE",), 0) == size()


def hostname() -> str:
    """This node's name according to the launcher, else to the system."""
    return os.environ.get("HOROVOD_HOSTNAME") or os.uname().nodename


def launch_id() -> Optional[str]:
    """An id that the processes of a launch share, across its restarts; None without one."""
    return os.environ.get("LAUNCH_ID")


def patience() -> float:
    """Seconds that a process may be silent, because it or its network stands still."""
    return float(_first_set(("HOROVOD_GLOO_TIMEOUT_SECONDS",), 30, least=1))


def where() -> str:
    """``rank 3 on node2``."""
    return f"rank {rank()} on {hostname()}"


def outlive_peers() -> None:
    """Under elastic horovodrun, re-execute below a process that survives lost peers.

    See launch/local/elastic_rank.py: Horovod's own elastic mode does not support MXNet. Elsewhere
    this does nothing.
    """
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        again = [sys.executable, "-m", "trainer", *sys.argv[1:]]
        os.execv(sys.executable, [sys.executable, "-m", "launch", "elastic-rank", "--", *again])

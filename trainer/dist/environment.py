"""This process's place among the ranks, read from its launcher's environment variables.

It needs no library. A process without a launcher is rank 0 of 1. Variables that no launcher has set
are refused (:func:`check`), because Horovod would wait for ranks that do not exist.
"""

from __future__ import annotations

import os
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


class LaunchError(UserError):
    """The environment names ranks that no launcher has started; printed by every process."""


def check() -> None:
    """Refuse an environment that names other ranks but not how to find them.

    Raises:
        LaunchError: HOROVOD_SIZE or HOROVOD_RANK is set, but not by a launcher.
    """
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


def _first_set(variables: Tuple[str, ...], default: int) -> int:
    for variable in variables:
        if variable in os.environ:
            try:
                return int(os.environ[variable])
            except ValueError:
                raise LaunchError(
                    f"{variable} is {show(os.environ[variable])}; it must be a whole number, as "
                    f"launchers set it: `unset {variable}`"
                ) from None
    return default


def size() -> int:
    """The number of ranks; 1 without a launcher."""
    return _first_set(_SIZE, 1)


def rank() -> int:
    """The rank of this process; 0 without a launcher."""
    return _first_set(_RANK, 0)


def local_size() -> int:
    """The number of ranks on this node; 1 without a launcher."""
    return _first_set(_LOCAL_SIZE, 1)


def local_rank() -> int:
    """The rank of this process on its node; 0 without a launcher."""
    return _first_set(_LOCAL_RANK, 0)


def hostname() -> str:
    """This node's name according to the launcher, else to the system."""
    return os.environ.get("HOROVOD_HOSTNAME") or os.uname().nodename


def launch_id() -> Optional[str]:
    """An id that the processes of a launch share, across its restarts; None without one."""
    return os.environ.get("LAUNCH_ID")


def patience() -> float:
    """Seconds that a process may be silent, because it or its network stands still."""
    return float(os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS", 30))


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

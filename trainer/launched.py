"""What this process's launcher says of it, known before any library is there.

A process that no launcher started is rank 0 of 1. Variables that somebody else has set are refused
(:func:`check`): Horovod would look for ranks that there are not.
"""

from __future__ import annotations

import os
import sys
from typing import Optional, Tuple

from .settings import UserError, show

# What horovodrun, `python -m launch`, mpirun and a bare srun set for each process they start.
_SIZE = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_RANK = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_LOCAL_SIZE = ("HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_LOCAL_RANK = ("HOROVOD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")

# One of them says how ranks meet: in horovodrun's or `python -m launch`'s store, or by MPI.
_MEETING = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


class LaunchError(UserError):
    """The environment speaks of ranks that no launcher has started; told on every one."""


def check() -> None:
    """Refuse to look for other ranks where nothing says how to find them.

    Raises:
        LaunchError: HOROVOD_SIZE or HOROVOD_RANK is set, but not by a launcher.
    """
    alone = size() == 1 and rank() == 0
    if alone or any(variable in os.environ for variable in _MEETING):
        return
    names = [v for v in ("HOROVOD_SIZE", "HOROVOD_RANK") if v in os.environ]
    if names:
        raise LaunchError(
            f"{' and '.join(f'{v}={os.environ[v]}' for v in names)} in the environment, without "
            f"{_MEETING[0]}, which launchers set as well: to train on one process, `unset "
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
    """How many ranks were started; 1 without a launcher."""
    return _first_set(_SIZE, 1)


def rank() -> int:
    """This process among them; 0 without a launcher."""
    return _first_set(_RANK, 0)


def local_size() -> int:
    """How many ranks this node has; 1 without a launcher."""
    return _first_set(_LOCAL_SIZE, 1)


def local_rank() -> int:
    """This process among those of its node; 0 without a launcher."""
    return _first_set(_LOCAL_RANK, 0)


def hostname() -> str:
    """This node's name as the launcher says, else the system's."""
    return os.environ.get("HOROVOD_HOSTNAME") or os.uname().nodename


def launch_id() -> Optional[str]:
    """What the processes of one launch have in common over all its restarts; None without one."""
    return os.environ.get("LAUNCH_ID")


def where() -> str:
    """``rank 3 on node2``."""
    return f"rank {rank()} on {hostname()}"


def outlive_peers() -> None:
    """Under elastic horovodrun, become the child of a process that does (launch/elastic_rank.py).

    Horovod's own elastic mode is not for MXNet. Elsewhere nothing happens.
    """
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        again = [sys.executable, "-m", "trainer", *sys.argv[1:]]
        os.execv(sys.executable, [sys.executable, "-m", "launch", "elastic-rank", "--", *again])

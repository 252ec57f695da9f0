"""What this process's launcher says of it, known before any library is there.

A process that no launcher started is rank 0 of 1.
"""

from __future__ import annotations

import os
from typing import Optional, Tuple

# What horovodrun, `python -m launch`, mpirun and a bare srun set for each process they start.
_SIZE = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_RANK = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_LOCAL_SIZE = ("HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_LOCAL_RANK = ("HOROVOD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


def _first_set(variables: Tuple[str, ...], default: int) -> int:
    for variable in variables:
        if variable in os.environ:
            return int(os.environ[variable])
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

"""The place of a rank in its job, and the environment variables that pass it on.

A rank learns its place from HOROVOD_* variables alone. Whatever starts it (the local launcher,
Slurm) fills in a `RankFacts` and starts it with `rank_environment(...)`.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Dict, Mapping, NamedTuple, Optional, Tuple

from .cpu_quota import quota_cores

EXIT_SAVED = 85
"""Exit code of a rank that was warned (SIGTERM, SIGUSR1), has saved, and should be restarted."""


class RankFacts(NamedTuple):
    """The place of a rank among all (`world_size`) and among those of its host (`local_size`).

    `cross_size` is the number of hosts with more than `local_rank` ranks, and `cross_rank` the
    number of those before this one. `hostname` must differ between hosts.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    hostname: str


def facts_on_one_host(rank: int, world_size: int) -> RankFacts:
    """The place of `rank` if all ranks run on this machine."""
    return RankFacts(rank, world_size, rank, world_size, 0, 1, "localhost")


def rank_environment(
    facts: RankFacts, rendezvous: Mapping[str, str], interface: str, cores: int, launch_id: str
) -> Dict[str, str]:
    """The environment of one rank: that of this process, plus variables for Horovod and OpenMP.

    The user's own settings for threads, NCCL and CUDA_VISIBLE_DEVICES are kept. `rendezvous` is
    `Endpoint.environment()`, `interface` the network interface towards the other ranks, `cores`
    the number of CPU cores of this rank. `launch_id` is the same for all ranks and across restarts,
    so that a command can tell its own checkpoints from older ones.
    """
    env = dict(os.environ)
    env.pop("HOROVOD_ELASTIC", None)  # left by an elastic horovodrun; these ranks have no other
    env.update({f"HOROVOD_{name.upper()}": str(value) for name, value in facts._asdict().items()})
    env.update(
        HOROVOD_SIZE=env.pop("HOROVOD_WORLD_SIZE"),
        HOROVOD_CONTROLLER="gloo",
        HOROVOD_CPU_OPERATIONS="gloo",
        HOROVOD_GLOO_IFACE=interface,
        LAUNCH_ID=launch_id,
        **rendezvous,
    )
    env.setdefault("NCCL_SOCKET_IFNAME", interface)
    env.setdefault("OMP_NUM_THREADS", str(cores))
    env.setdefault("PYTHONUNBUFFERED", "1")
    here = Path(sys.executable).parent
    if (here / "python").exists() and shutil.which("python") != str(here / "python"):
        # `python` must mean the interpreter that runs the launcher, also where its environment
        # (venv, conda) is not activated.
        env["LAUNCH_PATH"] = env.get("PATH", os.defpath)  # the user's own
        env["PATH"] = f"{here}{os.pathsep}{env['LAUNCH_PATH']}"
    return env


def count_of(env: Mapping[str, str], name: str, default: int) -> int:
    """The number, from 1, in a variable of the environment; raises ValueError if it is none."""
    given = env.get(name, str(default))
    if not re.fullmatch("0*[1-9][0-9]{0,5}", given):
        raise ValueError(
            f"{name} is {given!r}; it must be a whole number from 1 to 999999, such as {default}: "
            f"correct it, or `unset {name}`"
        )
    return int(given)


def cores_per_rank(ranks: int, env: Optional[Mapping[str, str]] = None) -> int:
    """CPU cores for each of the `ranks` that this process starts, at least 1.

    They divide what this process may use: its own cores, or fewer where its container has a CPU
    quota, or a Slurm allocation, whose sites need not bind processes to it, fewer of this node.
    """
    bound, on_node = _cores(os.environ if env is None else env)
    return max(1, min(bound, on_node) // ranks)


def cores_of_task(local_size: int, env: Optional[Mapping[str, str]] = None) -> int:
    """CPU cores of a Slurm task, one of `local_size` on this host, at least 1.

    Slurm's own division (SLURM_CPUS_PER_TASK) wins, but may be the job's, of which this step has
    got less. Otherwise the allocation's cores are divided; a task that Slurm has bound to few cores
    already does not divide those once more.
    """
    env = os.environ if env is None else env
    bound, on_node = _cores(env)
    if "SLURM_CPUS_PER_TASK" in env:
        return min(bound, count_of(env, "SLURM_CPUS_PER_TASK", 1))
    return max(1, min(bound, on_node // local_size))


def _cores(env: Mapping[str, str]) -> Tuple[int, int]:
    """How many this process is bound to, and how many of this node its job has.

    The latter is the least of its Slurm allocation and its container's CPU quota.
    """
    bound = len(os.sched_getaffinity(0))
    on_node = count_of(env, "SLURM_CPUS_ON_NODE", bound)
    return bound, min(on_node, quota_cores() or on_node)


def tasks_of_srun(env: Mapping[str, str]) -> int:
    """How many tasks srun has started along with this process; 1 outside of srun.

    1 also in a shell of `srun --pty`, which has the terminal; an srun within inherits the variable.
    """
    shell = "SLURM_PTY_PORT" in env and any(map(os.isatty, range(3)))
    alone = shell or "SLURM_PROCID" not in env
    return 1 if alone else count_of(env, "SLURM_STEP_NUM_TASKS", 1)

"""Converts Slurm's environment variables and compact lists to rank facts; pure functions."""

from __future__ import annotations

import hmac
import itertools
import random
import re
from typing import Callable, List, Mapping

from ..core.ranks import RankFacts

PORT_RANGE = range(20000, 32000)  # below the range that the kernel gives to outgoing connections
PORT_TRIES = 16

NOT_BY_SRUN = (
    "if srun has not started this process, these are another job's variables: "
    "`unset SLURM_JOB_ID SLURM_STEP_ID SLURM_PROCID`, and put srun before the command"
)

# What srun sets for each task.
_NEEDED = (
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
)


def expand_nodes(nodes: str) -> List[str]:
    """The host names of a Slurm node list: `gpu[01-03,7],login` -> gpu01 gpu02 gpu03 gpu7 login.

    Same as `scontrol show hostnames`, which containers do not have. Raises ValueError for a
    malformed list.
    """
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodes)
    if not parts or ",".join(parts) != nodes:
        raise ValueError(f"cannot read the node list {nodes!r}; expected e.g. node[1-3,5],login")
    names: List[str] = []
    for part in parts:
        words = re.split(r"\[(.*?)\]", part)  # every second one stood in brackets
        choices = [[word] for word in words]
        for place in range(1, len(words), 2):
            choices[place] = [n for piece in words[place].split(",") for n in _expand_range(piece)]
        names += map("".join, itertools.product(*choices))
    return names


def _expand_range(piece: str) -> List[str]:
    """`08-11` -> 08 09 10 11; leading zeros are kept."""
    if not re.fullmatch(r"\d+(-\d+)?", piece):
        raise ValueError(f"cannot read {piece!r} in a node list; expected a number or a range")
    first, _, last = piece.partition("-")
    return [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]


def expand_tasks(tasks: str) -> List[int]:
    """Tasks of each node, from SLURM_STEP_TASKS_PER_NODE: `2(x3),1` -> 2 2 2 1."""
    counts = []
    for piece in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", piece)
        if not match:
            raise ValueError(f"cannot read the tasks per node {tasks!r}; expected e.g. 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def facts_from_slurm(env: Mapping[str, str]) -> RankFacts:
    """The facts of the task with environment `env`, for any distribution of tasks over nodes.

    Raises ValueError outside of srun.
    """
    missing = [name for name in _NEEDED if name not in env]
    if missing:
        raise ValueError(
            f"{missing[0]} is not set: slurm-rank runs inside srun, as in "
            "`srun --ntasks=4 python -m launch slurm-rank -- COMMAND`"
        )
    tasks = expand_tasks(env["SLURM_STEP_TASKS_PER_NODE"])
    nodes = expand_nodes(env["SLURM_STEP_NODELIST"])
    node = _index(env, "SLURM_NODEID", min(len(tasks), len(nodes)))
    if env.get("SLURMD_NODENAME") in nodes:  # a heterogeneous job's numbers go by its parts
        node = nodes.index(env["SLURMD_NODENAME"])
    local_rank = _index(env, "SLURM_LOCALID", tasks[node])
    return RankFacts(
        rank=_index(env, "SLURM_PROCID", sum(tasks)),
        world_size=_index(env, "SLURM_STEP_NUM_TASKS", sum(tasks) + 1),
        local_rank=local_rank,
        local_size=tasks[node],
        cross_rank=sum(count > local_rank for count in tasks[:node]),
        cross_size=sum(count > local_rank for count in tasks),
        hostname=nodes[node],
    )


def _index(env: Mapping[str, str], name: str, end: int) -> int:
    """The variable's value, from 0 to `end` - 1; ValueError if it is not."""
    if not re.fullmatch("[0-9]{1,9}", env[name]) or int(env[name]) >= end:
        raise ValueError(
            f"{name} is {env[name]!r}, which does not fit SLURM_STEP_TASKS_PER_NODE="
            f"{env['SLURM_STEP_TASKS_PER_NODE']} and SLURM_STEP_NODELIST="
            f"{env['SLURM_STEP_NODELIST']}; {NOT_BY_SRUN}"
        )
    return int(env[name])


def step_launch_id(env: Mapping[str, str]) -> str:
    """A launch id shared by the tasks of a step and by the same step of the requeued job.

    LAUNCH_STEP names the one step of a job script, however often its ranks had to be started.
    """
    step = env.get("LAUNCH_STEP") or env["SLURM_STEP_ID"]
    return f"{env.get('SLURM_CLUSTER_NAME', 'slurm')}.{env['SLURM_JOB_ID']}.{step}"


def step_token(env: Mapping[str, str], secret: Callable[[], bytes]) -> str:
    """The token that all tasks of one step share, and that nobody else can know.

    It is derived from the step's name, which anybody can list, and a secret: LAUNCH_TOKEN, as a job
    script made by `python -m launch slurm` passes to its tasks, or else the user's `secret`.
    """
    known = env.get("LAUNCH_TOKEN", "").encode() or secret()
    restart = env.get("SLURM_RESTART_COUNT", "0")
    step = f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}.{restart}"
    return hmac.new(known, step.encode(), "sha256").hexdigest()[:32]


def rendezvous_ports(token: str) -> List[int]:
    """The ports that task 0 tries in turn, and on which the other tasks look for it.

    They are drawn from the step's token, so that jobs on the same node rarely collide, and that
    nobody can take them before.
    """
    return random.Random(f"ports of {token}").sample(PORT_RANGE, PORT_TRIES)

"""The actions of the command line for one machine: local and elastic-rank."""

from __future__ import annotations

import argparse
import os
import shlex
from typing import Any, List

from ..core.process import say
from ..options import add_seconds, add_start_timeout, whole_number


def add_local(actions: Any) -> None:
    local = actions.add_parser(
        "local",
        help="run COMMAND as N ranks on this machine",
        usage="python -m launch local -n N [--quiet] [elastic and other options] -- COMMAND",
    )
    local.add_argument("-n", "--ranks", type=whole_number(1), help="number of ranks")
    local.add_argument("--quiet", action="store_true", help="show only rank 0's output")
    meaning = "when a rank failed or after ctrl-C: time between SIGTERM and SIGKILL"
    add_seconds(local, "--kill-after", 10, meaning)
    add_start_timeout(local)
    _add_elastic(local)
    local.set_defaults(run=_run_local, needs_command=True)


def _add_elastic(local: argparse.ArgumentParser) -> None:
    elastic = local.add_argument_group(
        "elastic",
        "When a rank is lost, all are ended and COMMAND is started again; it must resume from its "
        "own checkpoints. After exit code 2 (bad input) nothing is started again.",
    )
    for name, least, meaning in (
        ("--min-ranks", 1, "drop a lost rank's slot, as long as N are left (else: replace it)"),
        ("--max-ranks", 1, "upper limit of ranks (default: -n, or as many as --discover finds)"),
        ("--max-restarts", 0, "times COMMAND is restarted (default 10 with one of these, else 0)"),
    ):
        elastic.add_argument(name, type=whole_number(least), metavar="N", help=meaning)
    elastic.add_argument(
        "--discover",
        metavar="COMMAND",
        help="shell command that prints how many ranks can run now; when that changes, ranks are "
        "warned, save, and are started again in that number",
    )
    add_seconds(elastic, "--discover-every", 5, "interval between its calls")


def _run_local(args: argparse.Namespace, command: List[str]) -> int:
    from .elastic import Discovery, Elastic
    from .local import run_local

    discovery = None
    if args.discover is not None:  # an empty command is told of as any that prints nothing
        discovery = Discovery(args.discover, args.discover_every)
    least, most, restarts = args.min_ranks, args.max_ranks, args.max_restarts
    ranks = args.ranks or (least if discovery else most)
    if ranks is None:
        raise ValueError("how many ranks? -n N")
    if restarts is None:
        restarts = 10 if least or most or discovery else 0
    elastic = Elastic(ranks, least, most, restarts, discovery, args.start_timeout)
    _tell_of_copies()
    options = args.arguments[: args.arguments.index("--") + 1]
    os.environ.setdefault("LAUNCHED_BY", shlex.join(options))  # for what a rank says to type next
    return run_local(command, elastic, args.quiet, args.kill_after, args.start_timeout)


def _tell_of_copies() -> None:
    """Only told, as each copy may have a job of its own: `name=run$SLURM_PROCID`."""
    from ..core.ranks import tasks_of_srun

    tasks = tasks_of_srun(os.environ)
    if tasks > 1 and os.environ["SLURM_PROCID"] == "0":
        say(
            f"srun has started {tasks} of these launchers, each with ranks of its own; for one job "
            "of all tasks: srun ... python -m launch slurm-rank -- COMMAND"
        )


def add_elastic_rank(actions: Any) -> None:
    elastic_rank = actions.add_parser(
        "elastic-rank",
        help="under elastic horovodrun: run COMMAND, and restart it when others are lost or added",
        usage="horovodrun --min-np N --host-discovery-script FILE [options] "
        "python -m launch elastic-rank -- COMMAND",
    )
    elastic_rank.set_defaults(run=_run_elastic_rank, needs_command=True)


def _run_elastic_rank(args: argparse.Namespace, command: List[str]) -> int:
    from .elastic_rank import run_elastic_rank

    return run_elastic_rank(command)

"""The command line: `python -m launch local | slurm | slurm-rank | elastic-rank | doctor`.

Each action imports what it needs when it runs, so that `--help` and a login node without Horovod
stay quick.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
from typing import Any, List, Optional, Sequence, Tuple

from launch import commands_slurm
from launch.options import add_start_timeout, natural, positive, seconds
from launch.process import open_standard_streams, say

_LIMITS = {
    errno.EMFILE: ": raise the limit of open files (`ulimit -n 4096`) or start fewer ranks",
    errno.EAGAIN: ": raise the limit of processes (`ulimit -u`) or start fewer ranks",
    errno.ENOMEM: ": raise the limit of memory (`ulimit -v`) or start fewer ranks",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs one action and returns its exit code; 2 for errors that the user can fix."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options, command = _split_command(arguments)
    parser = _parser()
    args, unknown = parser.parse_known_args(options)
    if args.needs_command and not command:
        missing = "what to run is" if not unknown or unknown[0].startswith("-") else "-- is"
        words = shlex.join(unknown) if missing == "-- is" else "COMMAND"
        parser.error(f"{missing} missing: python -m launch {args.action} ... -- {words}")
    if unknown:
        parser.error(f"unrecognized arguments: {shlex.join(unknown)}")
    args.arguments = arguments
    try:
        open_standard_streams()
        _check_current_folder()
        return int(args.run(args, command))
    except ModuleNotFoundError as error:
        say(f"{error}: type `make setup` in a clone and use .venv/bin/python")
        return 2
    except OSError as error:
        say(f"{error}{_LIMITS.get(error.errno or 0, '')}")
        return 2
    except RuntimeError as error:
        if str(error) != "can't start new thread":
            raise
        say(f"{error}{_LIMITS[errno.EAGAIN]}")
        return 2
    except ValueError as error:
        say(str(error))
        return 2


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the current folder was removed; cd to one that is there") from None


def _split_command(arguments: List[str]) -> Tuple[List[str], List[str]]:
    """The arguments before and after the first `--`."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch", description="Run any command as the ranks of one Horovod job."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_local(actions)
    _add_elastic_rank(actions)
    commands_slurm.add_slurm(actions)
    commands_slurm.add_slurm_rank(actions)
    commands_slurm.add_slurm_job(actions)
    _add_doctor(actions)
    return parser


def _add_local(actions: Any) -> None:
    local = actions.add_parser(
        "local",
        help="run COMMAND as N ranks on this machine",
        usage="python -m launch local -n N [--quiet] [elastic and other options] -- COMMAND",
    )
    local.add_argument("-n", "--ranks", type=positive, help="number of ranks")
    local.add_argument("--quiet", action="store_true", help="show only rank 0's output")
    local.add_argument(
        "--kill-after",
        type=seconds,
        default=10.0,
        metavar="SECONDS",
        help="when a rank failed or after ctrl-C: time between SIGTERM and SIGKILL (default 10)",
    )
    add_start_timeout(local)
    _add_elastic(local)
    local.set_defaults(run=_run_local, needs_command=True)


def _add_elastic(local: argparse.ArgumentParser) -> None:
    elastic = local.add_argument_group(
        "elastic",
        "When a rank is lost, all are ended and COMMAND is started again; it must resume from its "
        "own checkpoints. After exit code 2 (bad input) nothing is started again.",
    )
    elastic.add_argument(
        "--min-ranks",
        type=positive,
        metavar="N",
        help="drop the slot of a lost rank, as long as N are left (default: replace it)",
    )
    elastic.add_argument(
        "--max-ranks",
        type=positive,
        metavar="N",
        help="upper limit of ranks (default: -n, or as many as --discover finds)",
    )
    elastic.add_argument(
        "--max-restarts",
        type=natural,
        metavar="N",
        help="how often COMMAND is restarted (default 10 with one of these options, else 0)",
    )
    elastic.add_argument(
        "--discover",
        metavar="COMMAND",
        help="shell command that prints how many ranks can run now; when that changes, ranks are "
        "warned, save, and are started again in that number",
    )
    elastic.add_argument(
        "--discover-every",
        type=seconds,
        default=5.0,
        metavar="SECONDS",
        help="interval between its calls (default 5)",
    )


def _run_local(args: argparse.Namespace, command: List[str]) -> int:
    from launch.discovery import Discovery
    from launch.elastic import Elastic
    from launch.local import run_local

    ranks = args.ranks or (args.min_ranks if args.discover else args.max_ranks)
    if ranks is None:
        raise ValueError("how many ranks? -n N")
    restarts = args.max_restarts
    if restarts is None:
        restarts = 10 if args.min_ranks or args.max_ranks or args.discover else 0
    elastic = Elastic(
        ranks=ranks,
        min_ranks=args.min_ranks,
        max_ranks=args.max_ranks,
        max_restarts=restarts,
        discovery=Discovery(args.discover, args.discover_every) if args.discover else None,
        patience=args.start_timeout,
    )
    _tell_of_copies()
    return run_local(command, elastic, args.quiet, args.kill_after, args.start_timeout)


def _tell_of_copies() -> None:
    """Only told, as each copy may have a job of its own: `name=run$SLURM_PROCID`."""
    from launch.slurm import tasks_of_srun

    tasks = tasks_of_srun(os.environ)
    if tasks > 1 and os.environ["SLURM_PROCID"] == "0":
        say(
            f"srun has started {tasks} of these launchers, each with ranks of its own; for one job "
            "of all tasks: srun ... python -m launch slurm-rank -- COMMAND"
        )


def _add_elastic_rank(actions: Any) -> None:
    elastic_rank = actions.add_parser(
        "elastic-rank",
        help="under elastic horovodrun: run COMMAND, and restart it when others are lost or added",
        usage="horovodrun --min-np N --host-discovery-script FILE [options] "
        "python -m launch elastic-rank -- COMMAND",
    )
    elastic_rank.set_defaults(run=_run_elastic_rank, needs_command=True)


def _run_elastic_rank(args: argparse.Namespace, command: List[str]) -> int:
    from launch.elastic_rank import run_elastic_rank

    return run_elastic_rank(command)


def _add_doctor(actions: Any) -> None:
    doctor = actions.add_parser(
        "doctor",
        help="check whether this machine can train, and how to fix it if not",
        usage="[srun --ntasks-per-node=1] python -m launch doctor",
    )
    doctor.set_defaults(run=_run_doctor, needs_command=False)


def _run_doctor(args: argparse.Namespace, command: List[str]) -> int:
    from launch.doctor import examine

    return examine()


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `python -m launch local | slurm | slurm-rank | doctor`."""

from __future__ import annotations

import argparse
import sys
from typing import Any, List, Optional, Sequence, Tuple

from launch.process import say


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs one subcommand and returns its exit code; 2 for what the user can set right."""
    options, command = _split_command(list(sys.argv[1:] if argv is None else argv))
    parser = _parser()
    args = parser.parse_args(options)
    if args.needs_command and not command:
        parser.error(f"what to run is missing: python -m launch {args.action} ... -- COMMAND")
    try:
        return int(args.run(args, command))
    except (ValueError, OSError) as error:
        say(str(error))
        return 2


def _split_command(arguments: List[str]) -> Tuple[List[str], List[str]]:
    """What stands before and after the first `--`."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_local(actions)
    _add_slurm_rank(actions)
    return parser


def _add_local(actions: Any) -> None:
    local = actions.add_parser(
        "local",
        help="run COMMAND as N ranks on this machine",
        usage="python -m launch local -n N [--quiet] [options] -- COMMAND",
    )
    local.add_argument("-n", "--ranks", type=_positive, required=True, help="number of ranks")
    local.add_argument("--quiet", action="store_true", help="show only what rank 0 says")
    local.add_argument(
        "--kill-after",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="when a rank failed or after ctrl-C: time between SIGTERM and SIGKILL (default 10)",
    )
    _add_start_timeout(local)
    local.set_defaults(run=_run_local, needs_command=True)


def _run_local(args: argparse.Namespace, command: List[str]) -> int:
    from launch.local import run_local

    return run_local(command, args.ranks, args.quiet, args.kill_after, args.start_timeout)


def _add_slurm_rank(actions: Any) -> None:
    slurm_rank = actions.add_parser(
        "slurm-rank",
        help="inside srun: become the rank that Slurm's variables say, and run COMMAND",
        usage="srun [options] python -m launch slurm-rank [--start-timeout SECONDS] -- COMMAND",
    )
    _add_start_timeout(slurm_rank)
    slurm_rank.set_defaults(run=_run_slurm_rank, needs_command=True)


def _run_slurm_rank(args: argparse.Namespace, command: List[str]) -> int:
    from launch.slurm_rank import become_rank

    become_rank(command, args.start_timeout)


def _add_start_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--start-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long the first ranks wait for the last one to come (default 600)",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    sys.exit(main())

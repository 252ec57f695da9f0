"""The command line: `python -m launch local | slurm | slurm-rank | elastic-rank | doctor`.

Each action imports what it needs when it runs, so that `--help` and a login node without Horovod
stay quick.
"""

from __future__ import annotations

import argparse
import errno
import shlex
import sys
from typing import Any, List, Optional, Sequence, Tuple

import launch

from .core import streams
from .local.commands import add_elastic_rank, add_local
from .options import Parser
from .slurm.commands import add_slurm, add_slurm_job, add_slurm_rank

_WAYS_OUT = {
    errno.EMFILE: ": raise the limit of open files (`ulimit -n 4096`) or start fewer ranks",
    errno.EAGAIN: ": raise the limit of processes (`ulimit -u`) or start fewer ranks",
    errno.ENOMEM: ": raise the limit of memory (`ulimit -v`) or start fewer ranks",
    errno.ENOEXEC: ": a script begins with a line such as #!/bin/bash; or put bash before it",
}


def run() -> None:
    """Runs the command line, and leaves: a rank's own children may hold threads of ours up."""
    streams.run(main, streams.leave)


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
        streams.check_current_folder()
        return int(args.run(args, command))
    except ModuleNotFoundError as error:
        wrong = f"{error}; or type `make setup` in a clone and use .venv/bin/python"
    except OSError as error:
        wrong = f"{error}{_WAYS_OUT.get(error.errno or 0, '')}"
    except RuntimeError as error:
        if str(error) != "can't start new thread":
            raise
        wrong = f"{error}{_WAYS_OUT[errno.EAGAIN]}"
    except ValueError as error:
        wrong = str(error)
    streams.print_error(wrong)
    return streams.USER_ERROR


def _split_command(arguments: List[str]) -> Tuple[List[str], List[str]]:
    """The arguments before and after the first `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


class _ShowVersion(argparse.Action):
    """Unlike argparse's own, looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        streams.answer(f"gluon-horovod-trainer {launch.__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m launch", description="Run any command as the ranks of one Horovod job."
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    for add in (add_local, add_elastic_rank, add_slurm, add_slurm_rank, add_slurm_job):
        add(actions)
    doctor = actions.add_parser(
        "doctor",
        help="check whether this machine can train, and how to fix it if not",
        usage="[srun -n $SLURM_JOB_NUM_NODES --ntasks-per-node=1] python -m launch doctor",
    )
    doctor.set_defaults(run=_run_doctor, needs_command=False)
    return parser


def _run_doctor(args: argparse.Namespace, command: List[str]) -> int:
    from .doctor.doctor import examine

    return examine()


if __name__ == "__main__":
    run()

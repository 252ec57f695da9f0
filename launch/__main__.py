"""The command line: `python -m launch local | slurm | slurm-rank | elastic-rank | doctor`.

Each action imports what it needs when it runs, so that `--help` and a login node without Horovod
stay quick.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

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
    _add_slurm(actions)
    _add_slurm_rank(actions)
    _add_slurm_job(actions)
    _add_doctor(actions)
    return parser


def _add_local(actions: Any) -> None:
    local = actions.add_parser(
        "local",
        help="run COMMAND as N ranks on this machine",
        usage="python -m launch local -n N [--quiet] [elastic and other options] -- COMMAND",
    )
    local.add_argument("-n", "--ranks", type=_positive, help="number of ranks")
    local.add_argument("--quiet", action="store_true", help="show only rank 0's output")
    local.add_argument(
        "--kill-after",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="when a rank failed or after ctrl-C: time between SIGTERM and SIGKILL (default 10)",
    )
    _add_start_timeout(local)
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
        type=_positive,
        metavar="N",
        help="drop the slot of a lost rank, as long as N are left (default: replace it)",
    )
    elastic.add_argument(
        "--max-ranks",
        type=_positive,
        metavar="N",
        help="upper limit of ranks (default: -n, or as many as --discover finds)",
    )
    elastic.add_argument(
        "--max-restarts",
        type=_natural,
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
        type=_seconds,
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
    return run_local(command, elastic, args.quiet, args.kill_after, args.start_timeout)


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


def _add_slurm(actions: Any) -> None:
    slurm = actions.add_parser(
        "slurm",
        help="submit a job that runs COMMAND as ranks on many nodes",
        usage="python -m launch slurm --nodes N --gpus-per-node G --time T [options] -- COMMAND",
    )
    slurm.add_argument("--nodes", type=int, help="number of nodes (default 1)")
    slurm.add_argument("--gpus-per-node", type=int, help="GPUs per node, with one rank for each")
    slurm.add_argument("--ranks-per-node", type=int, help="if not one for each GPU")
    slurm.add_argument("--cpus-per-rank", type=int, help="cores for each rank")
    slurm.add_argument("--time", help="time limit: minutes, HH:MM:SS or D-HH:MM:SS")
    slurm.add_argument("--partition")
    slurm.add_argument("--account")
    slurm.add_argument("--qos")
    slurm.add_argument("--name", help="job name (default train)")
    slurm.add_argument("--log", help="log file; %%j is the job's id (default slurm-%%j.log)")
    slurm.add_argument("--container", metavar="IMAGE", help="run the ranks inside this image")
    slurm.add_argument("--container-runtime", help="apptainer (default) or pyxis")
    slurm.add_argument(
        "--save-seconds",
        type=int,
        help="how long before the time limit the ranks are warned, so that they save (default 60)",
    )
    slurm.add_argument(
        "--max-requeues", type=int, help="how often the job may requeue itself (default 10)"
    )
    slurm.add_argument(
        "--site",
        type=Path,
        help="YAML file with the site's defaults (default $LAUNCH_SITE or configs/site.yaml)",
    )
    slurm.add_argument("--dry-run", action="store_true", help="show the job script, submit nothing")
    slurm.add_argument("--follow", action="store_true", help="show the log until the job ends")
    slurm.set_defaults(run=_run_slurm, needs_command=True)


def _run_slurm(args: argparse.Namespace, command: List[str]) -> int:
    from launch.job_script import JobOptions, job_options, read_site, render

    site_file = args.site or _default_site()
    given = {k: v for k, v in vars(args).items() if k in JobOptions.__dataclass_fields__}
    options = job_options(read_site(site_file) if site_file else {}, given)
    made_by = ["python", "-m", "launch", *args.arguments]
    script = render(options, command, Path.cwd(), sys.executable, made_by)
    if args.dry_run:
        print(script, end="")
        return 0
    return _submit(script, args.follow)


def _submit(script: str, follow_it: bool) -> int:
    from launch.submit import follow, log_path, submit

    job_id = submit(script)
    log = log_path(script, job_id)
    message = f"job {job_id} is submitted; its log: {log}"
    try:
        print(message, flush=True)
    except OSError as error:  # after an exit code of failure, a user or script submits it again
        say(f"{message} (stdout: {error.strerror})")
    return follow(job_id, log) if follow_it else 0


def _default_site() -> Optional[Path]:
    if "LAUNCH_SITE" in os.environ:
        return Path(os.environ["LAUNCH_SITE"])
    here = Path("configs/site.yaml")
    return here if here.exists() else None


def _add_slurm_rank(actions: Any) -> None:
    slurm_rank = actions.add_parser(
        "slurm-rank",
        help="inside srun: become the rank given by Slurm's variables, and run COMMAND",
        usage="srun [options] python -m launch slurm-rank [--start-timeout SECONDS] -- COMMAND",
    )
    _add_start_timeout(slurm_rank)
    slurm_rank.set_defaults(run=_run_slurm_rank, needs_command=True)


def _run_slurm_rank(args: argparse.Namespace, command: List[str]) -> int:
    from launch.slurm_rank import become_rank

    become_rank(command, args.start_timeout)


def _add_slurm_job(actions: Any) -> None:
    slurm_job = actions.add_parser(
        "slurm-job",
        help="inside a job script: run srun, explain a failure, requeue a job that saved",
        usage="python -m launch slurm-job [options] -- srun --label ... slurm-rank -- COMMAND",
    )
    slurm_job.add_argument("--save-seconds", type=_natural, default=60)
    slurm_job.add_argument("--max-requeues", type=_natural, default=10)
    slurm_job.set_defaults(run=_run_slurm_job, needs_command=True)


def _run_slurm_job(args: argparse.Namespace, command: List[str]) -> int:
    from launch.slurm_job import run_job

    return run_job(command, args.save_seconds, args.max_requeues)


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


def _add_start_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--start-timeout",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="how long ranks wait for the last one to arrive (default 600)",
    )


def _positive(text: str) -> int:
    return _whole_number(text, 1)


def _natural(text: str) -> int:
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    if not re.fullmatch("[0-9]{1,4}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to 9999")
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, such as 10 or 0.5")
    return float(text)


if __name__ == "__main__":
    sys.exit(main())

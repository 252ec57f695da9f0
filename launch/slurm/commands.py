"""The actions of the command line for Slurm: slurm, slurm-rank and slurm-job.

Each imports what it needs when it runs, see __main__.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, List

from ..core.process import say
from ..core.streams import answer, write
from ..options import add_start_timeout, whole_number
from .script import JobOptions, job_options, read_site, render


def add_slurm(actions: Any) -> None:
    slurm = actions.add_parser(
        "slurm",
        help="submit a job that runs COMMAND as ranks on many nodes",
        usage="python -m launch slurm --nodes N --gpus-per-node G --time T [options] -- COMMAND",
    )
    for option in fields(JobOptions):
        if "help" in option.metadata:
            name, kind = f"--{option.name.replace('_', '-')}", str(option.type)
            flag = {"action": "store_const", "const": True}  # else None: the site's stands
            how: Any = {"bool": flag, "Tuple[str, ...]": {"action": "append"}}.get(kind, {})
            slurm.add_argument(name, help=option.metadata["help"], **how)
    slurm.add_argument(
        "--site",
        type=Path,
        help="YAML file with the site's defaults (default $LAUNCH_SITE or configs/site.yaml)",
    )
    slurm.add_argument("--dry-run", action="store_true", help="show the job script, submit nothing")
    slurm.add_argument("--follow", action="store_true", help="show the log until the job ends")
    slurm.set_defaults(run=_run_slurm, needs_command=True)


def _run_slurm(args: argparse.Namespace, command: List[str]) -> int:
    usual = "configs/site.yaml"
    site = args.site or os.environ.get("LAUNCH_SITE") or (os.path.exists(usual) and usual)
    given = {k: v for k, v in vars(args).items() if k in JobOptions.__dataclass_fields__}
    options = job_options(read_site(Path(site)) if site else {}, given)
    made_by = ["python", "-m", "launch", *args.arguments]
    script = render(options, command, Path.cwd(), sys.executable, made_by)
    if args.dry_run:
        answer(script.rstrip("\n"))
        return 0
    return _submit(script, args.follow)


def _submit(script: str, follow_it: bool) -> int:
    from .submit import check_followable, follow, log_path, submit

    if follow_it:
        check_followable(script)
    job_id = submit(script)
    log = log_path(script, job_id)
    message = f"job {job_id} is submitted; its log: {log}"
    try:
        write(f"{message}\n")
    except OSError as error:  # after an exit code of failure, a user or script submits it again
        say(f"{message} (stdout: {error.strerror})")
    return follow(job_id, log) if follow_it else 0


def add_slurm_rank(actions: Any) -> None:
    slurm_rank = actions.add_parser(
        "slurm-rank",
        help="inside srun: become the rank given by Slurm's variables, and run COMMAND",
        usage="srun [options] python -m launch slurm-rank [--start-timeout SECONDS] -- COMMAND",
    )
    add_start_timeout(slurm_rank)
    slurm_rank.set_defaults(run=_run_slurm_rank, needs_command=True)


def _run_slurm_rank(args: argparse.Namespace, command: List[str]) -> int:
    from .rank import become_rank

    become_rank(command, args.start_timeout)


def add_slurm_job(actions: Any) -> None:
    slurm_job = actions.add_parser(
        "slurm-job",
        help="inside a job script: run srun, explain a failure, requeue a job that saved",
        usage="python -m launch slurm-job [options] -- srun --label ... slurm-rank -- COMMAND",
    )
    slurm_job.add_argument("--save-seconds", type=whole_number(0), default=60)
    slurm_job.add_argument("--max-requeues", type=whole_number(0), default=10)
    slurm_job.set_defaults(run=_run_slurm_job, needs_command=True)


def _run_slurm_job(args: argparse.Namespace, command: List[str]) -> int:
    from .batch import run_job

    return run_job(command, args.save_seconds, args.max_requeues)

"""Submits a job script to Slurm, and shows the job's log until it ends."""

from __future__ import annotations

import difflib
import os
import pwd
import re
import shlex
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Tuple

from ..core.process import say
from ..core.streams import write

POLL_SECONDS = 1.0
_OTHER_NAMES = {"SBATCH_TIME": "SBATCH_TIMELIMIT", "SBATCH_REQUEUE": "SBATCH_NO_REQUEUE"}
_FIELD = re.compile(r"%([0-9]*)([a-zA-Z%])")  # in a log's name; a number pads the ids
_TOO_MUCH = ("PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit", "BadConstraints")
_ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED")


def submit(script: str) -> str:
    """The id that Slurm gives to the job; ValueError in one line when it refuses it."""
    if shutil.which("sbatch") is None:
        raise ValueError(
            "sbatch is not on this machine: run this on a login node of the cluster, "
            "or add --dry-run to see the job script"
        )
    _make_log_folder(script)
    done = _run(["sbatch", "--parsable"], script, _environment(script))
    if done.returncode:
        raise ValueError(_explain_refusal(script, done.stderr))
    return done.stdout.strip().split(";")[0]  # ID, or ID;CLUSTER


def _make_log_folder(script: str) -> None:
    """Slurm makes none: it would fail the job as JobLaunchFailure, with no log to say why."""
    folder = Path(_option(script, "output") or "").parent
    if "%" in str(folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # it may be there on the nodes alone
        say(f"the log's folder cannot be made here; the job fails where it is missing: {error}")


def log_path(script: str, job_id: str) -> Path:
    """The log file of the job with this script and id.

    What only Slurm knows is left as it stands, such as %N, and %j in an array, which has one for
    each task.
    """
    values = {"j": job_id, "A": job_id, "x": _option(script, "job-name") or "", "%": "%"}
    with suppress(KeyError):  # this user has no name here
        values["u"] = pwd.getpwuid(os.getuid()).pw_name
    if _is_array(script):
        del values["j"]

    def expand(field: re.Match[str]) -> str:
        value = values.get(field[2], field[0])
        return value.zfill(int(field[1] or 0)) if value.isdigit() else value

    return Path(_FIELD.sub(expand, _option(script, "output") or ""))


def check_followable(script: str) -> None:
    """Raises ValueError when `follow` could not know the job's log."""
    if _is_array(script):
        raise ValueError("--follow shows one log, but each task of --array has its own")
    log = _option(script, "output") or ""
    for field in _FIELD.finditer(log):
        if field[2] not in "jAxu%":
            raise ValueError(
                f"--follow cannot know {field[0]} in the log's name {log}; it knows %j, %A, %x, "
                "%u and %%"
            )


def _is_array(script: str) -> bool:
    return any(re.fullmatch("array|a[0-9]*", option) for option, _ in _options(script))


def _option(script: str, name: str) -> Optional[str]:
    """The value of an option in the script's #SBATCH lines; None if it is not there."""
    return next((value for option, value in _options(script) if option == name), None)


def _options(script: str) -> List[Tuple[str, str]]:
    """Name and value of each option in the script's #SBATCH lines."""
    header, _, _ = script.partition("\n\n")  # as Slurm, which stops at the first command
    lines = re.findall(r"^#SBATCH (.+)$", header, re.MULTILINE)
    words = [shlex.split(line)[0].partition("=") for line in lines]
    return [(option.lstrip("-"), value) for option, _, value in words]


def _environment(script: str) -> Dict[str, str]:
    """The environment without variables that would mislead the job.

    The user's SBATCH_ variables take precedence over what the script asks for. Those of a job that
    submits this one, such as SLURM_GPUS_PER_TASK, are options of its srun.
    """
    names = {f"SBATCH_{option.upper().replace('-', '_')}" for option, _ in _options(script)}
    names |= {_OTHER_NAMES[name] for name in names & set(_OTHER_NAMES)}
    if "SLURM_JOB_ID" in os.environ:
        names |= {name for name in os.environ if name.startswith("SLURM_")} - {"SLURM_CONF"}
    return {name: value for name, value in os.environ.items() if name not in names}


def follow(job_id: str, log: Path) -> int:
    """Copies the log to stdout until the job has ended, over requeues too; its exit code.

    Ctrl-C, or a stdout that takes no more (`| head`, a full disk), ends the display, not the job.
    """
    shown: Optional[str] = None
    offset = 0
    try:
        while True:
            state, reason = _state(job_id)
            offset = _copy_from(log, offset)
            told = f"{state} ({reason})" if reason not in ("", "None") else state
            if state == "PENDING" and reason in _TOO_MUCH:
                told += (
                    f": it asks for more than its partition gives; `scancel {job_id}` withdraws it"
                )
            if told != shown:
                say(f"job {job_id} is {told}")
                shown = told
            if state not in _ACTIVE:
                return _exit_code(job_id)
            time.sleep(POLL_SECONDS)
    except (KeyboardInterrupt, OSError) as error:
        reason = f" ({error})" if str(error) else ""
        say(f"job {job_id} keeps running; end it with `scancel {job_id}`, its log is {log}{reason}")
        return 130


def _run(
    command: List[str], stdin: str = "", env: Optional[Mapping[str, str]] = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, input=stdin, env=env, capture_output=True, text=True, check=False
    )


def _explain_refusal(script: str, error: str) -> str:
    """sbatch's own message; for an unknown partition, the existing ones."""
    words = " ".join(line.replace("sbatch: error: ", "") for line in error.split("\n") if line)
    partition = _option(script, "partition")
    if partition and "partition" in words.lower():
        known = _run(["sinfo", "--noheader", "--format=%R"]).stdout.split()
        near = difflib.get_close_matches(partition, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if partition not in known:
            return f"there is no partition {partition!r}, only {', '.join(sorted(known))}{hint}"
    return f"sbatch refused the job: {words}"


def _state(job_id: str) -> Tuple[str, str]:
    """JobState and Reason. Slurm forgets an ended job after some minutes (MinJobAge)."""
    shown = _run(["scontrol", "show", "job", "-o", job_id])
    state = re.search(r"\bJobState=(\S+)", shown.stdout)
    reason = re.search(r"\bReason=(\S+)", shown.stdout)
    if state:
        return state[1], reason[1] if reason else ""
    if "Invalid job id" in shown.stderr:
        return "unknown to Slurm by now", ""
    return "RUNNING", f"Slurm does not answer: {shown.stderr.strip()}"


def _exit_code(job_id: str) -> int:
    """The job's exit code as a shell would report it; 1 when only its state tells of a failure."""
    shown = _run(["scontrol", "show", "job", "-o", job_id]).stdout
    found = re.search(r"\bExitCode=(\d+):(\d+)", shown)
    code = (int(found[1]) or (128 + int(found[2]) if int(found[2]) else 0)) if found else 1
    return code or (0 if "JobState=COMPLETED" in shown else 1)


def _copy_from(path: Path, offset: int) -> int:
    """Copies the file from `offset` on to stdout; returns the new offset."""
    if not path.exists():
        return offset
    with open(path, "rb") as source:
        source.seek(offset)
        text = source.read()
    write(text)
    return offset + len(text)

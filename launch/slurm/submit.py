"""Submits a job script to Slurm, and shows the job's log until it ends."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from ..core.process import run, say
from ..core.streams import write

POLL_SECONDS = 1.0
_FIELD = re.compile(r"%([0-9]*)([a-zA-Z%])")  # in a log's name; a number pads the ids
_ENDED = (  # others, such as SIGNALING, RESIZING and REQUEUE_HOLD, pass
    *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"),
    *("DEADLINE", "OUT_OF_MEMORY", "REVOKED", "unknown to Slurm by now"),
)


def submit(script: str) -> str:
    """The id that Slurm gives to the job; ValueError in one line when it refuses it."""
    if shutil.which("sbatch") is None:
        raise ValueError(
            "sbatch is not on this machine: run this on a login node of the cluster, "
            "or add --dry-run to see the job script"
        )
    _make_log_folder(script)
    # As words they win over the user's SBATCH_ variables, which win over the script.
    done = run(["sbatch", "--parsable", *_words(script)], script, _environment())
    if done.returncode:
        words = " ".join(done.stderr.replace("sbatch: error: ", "").split())
        raise ValueError(f"sbatch refused the job: {words}")
    return done.stdout.split()[-1].split(";")[0]  # ID, or ID;CLUSTER; before it what a site says


def _make_log_folder(script: str) -> None:
    """Slurm makes none: it would fail the job as JobLaunchFailure, with no log to say why."""
    folder = Path(_option(script, "output") or "").parent
    if "%" in str(folder).replace("%%", ""):
        return
    try:
        Path(str(folder).replace("%%", "%")).mkdir(parents=True, exist_ok=True)
    except OSError as error:  # it may be there on the nodes alone
        say(f"the log's folder cannot be made here; the job fails where it is missing: {error}")


def log_path(script: str, job_id: str) -> Path:
    """The log file of the job with this script and id.

    What only Slurm knows is left as it stands, such as %N, and %j in an array, which has one for
    each task.
    """
    values = _log_fields(script, job_id)

    def expand(field: re.Match[str]) -> str:
        value = values.get(field[2], field[0])
        return value.zfill(int(field[1] or 0)) if value.isdigit() else value

    return Path(_FIELD.sub(expand, _option(script, "output") or ""))


def _log_fields(script: str, job_id: str) -> Dict[str, str]:
    """The fields in a log's name that are known here, and what they stand for."""
    values = {"j": job_id, "A": job_id, "x": _option(script, "job-name") or "", "%": "%"}
    with suppress(KeyError):  # this user has no name here
        values["u"] = pwd.getpwuid(os.getuid()).pw_name
    if any(re.fullmatch("array|a[0-9]*", option) for option, _ in _options(script)):
        del values["j"]
    return values


def check_followable(script: str) -> None:
    """Raises ValueError when `follow` could not know the job's log."""
    fields = {field[2] for field in _FIELD.finditer(_option(script, "output") or "")}
    if fields - _log_fields(script, "0").keys():
        raise ValueError(
            "--follow cannot know the log's name before the job runs, "
            f"{log_path(script, '0')}: it knows %j, %A, %x and %u, and no log of the tasks of "
            "--array"
        )


def _option(script: str, name: str) -> Optional[str]:
    """The value of an option in the script's #SBATCH lines, the last; None if it is not there."""
    return dict(_options(script)).get(name)


def _options(script: str) -> List[Tuple[str, str]]:
    """Name and value of each option in the script's #SBATCH lines."""
    words = [word.partition("=") for word in _words(script)]
    return [(option.lstrip("-"), value) for option, _, value in words]


def _words(script: str) -> List[str]:
    """The options in the script's #SBATCH lines."""
    header, _, _ = script.partition("\n\n")  # as Slurm, which stops at the first command
    return [shlex.split(line)[0] for line in re.findall(r"^#SBATCH (.+)$", header, re.MULTILINE)]


def _environment() -> Dict[str, str]:
    """The environment without that of a job that submits this one.

    Its SLURM_GPUS_PER_TASK and others would be options of the new one's srun.
    """
    inside = "SLURM_JOB_ID" in os.environ
    variables = os.environ.items()
    return {k: v for k, v in variables if k == "SLURM_CONF" or not (inside and k[:6] == "SLURM_")}


def follow(job_id: str, log: Path) -> int:
    """Copies the log to stdout until the job has ended, over requeues too; its exit code.

    Ctrl-C, or a stdout that takes no more (`| head`, a full disk), ends the display, not the job.
    """
    told = ""
    offset = 0
    try:
        while True:
            job = _job(job_id)
            if log.exists():
                with open(log, "rb") as source:
                    source.seek(offset)
                    text = source.read()
                write(text)
                offset += len(text)
            state = f"{job['JobState']} ({job['Reason']})".replace(" (None)", "")
            if told != state:
                say(f"job {job_id} is {state}")
                told = state
            if job["JobState"] in _ENDED:
                code, signum = map(int, job["ExitCode"].split(":"))
                # As a shell would have it; 1 when only the job's state tells of a failure.
                return code or (128 + signum if signum else int(job["JobState"] != "COMPLETED"))
            time.sleep(POLL_SECONDS)
    except (KeyboardInterrupt, OSError) as error:
        reason = f" ({error})" if str(error) else ""
        say(f"job {job_id} keeps running; end it with `scancel {job_id}`, its log is {log}{reason}")
        return 130


def _job(job_id: str) -> Dict[str, str]:
    """JobState, Reason and ExitCode. Slurm forgets an ended job after some minutes (MinJobAge)."""
    shown = run(["scontrol", "show", "job", "-o", job_id])
    found = dict(reversed(re.findall(r"\b(JobState|Reason|ExitCode)=(\S+)", shown.stdout)))
    unknown = "Invalid job id" in shown.stderr
    silent = {"JobState": "RUNNING", "Reason": f"Slurm does not answer: {shown.stderr.strip()}"}
    state = {"JobState": "unknown to Slurm by now"} if unknown else silent
    return {"Reason": "None", "ExitCode": "1:0", **({} if found else state), **found}

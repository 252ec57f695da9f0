"""Why a Slurm job was warned, and whether it must requeue itself.

Observed with Slurm 22.05 (tests/integration/test_slurm.py verifies it). When the ranks have ended
and `srun` has returned, the job's record and output show the cause:

| what happened      | JobState | what else                                        | requeued by |
| ------------------ | -------- | ------------------------------------------------ | ----------- |
| time-limit warning | RUNNING  | EndTime is near                                  | us          |
| preemption         | RUNNING  | PreemptTime is set                               | us          |
| scancel -s USR1    | RUNNING  | neither                                          | us          |
| time limit reached | another  | slurmstepd cancels the step "DUE TO TIME LIMIT"  | us          |
| scontrol requeue   | another  | slurmstepd cancels it "DUE TO JOB REQUEUE"       | Slurm       |
| preemption, late   | another  | it is "DUE TO PREEMPTION"; Restarts has grown    | Slurm       |
| the same           | another  | Restarts has not: PreemptMode=CANCEL             | us          |
| scancel            | another  | slurmstepd cancels it and gives no reason        | nobody      |

`scontrol requeue` would run a cancelled job again, so it cannot be used to find out.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Dict, NamedTuple, Optional

SIGNAL_EARLY_SECONDS = 60
"""Slurm may send the warning up to a minute earlier than requested (man sbatch, --signal)."""

ASKED = "asked to save (SIGUSR1 or SIGTERM)"

_STEP_CANCELLED = re.compile(
    r"\*\*\* STEP \S+ ON \S+ CANCELLED AT \S+(?: DUE TO ([A-Z ]+?))? \*\*\*"
)


class JobRecord(NamedTuple):
    """What `scontrol show job` says of a job; times are the controller's local ones.

    `name` is what scontrol takes for this job alone: the number of an array's last task is that of
    the whole array.
    """

    name: str
    state: str
    time_limit: str
    end: Optional[datetime]
    preempted: Optional[datetime]
    restarts: int
    held: bool = False


class Verdict(NamedTuple):
    """What happens to the job: the line for its log, and whether to ask Slurm to requeue it."""

    message: str
    requeue: bool = False


def parse_job(shown: str, job_id: str) -> JobRecord:
    """Reads the job out of `scontrol show job -o`, which shows a line for each task of an array.

    ValueError when it is not there.
    """
    lines = [line for line in shown.splitlines() if line.startswith(f"JobId={job_id} ")]
    fields: Dict[str, str] = {}
    for word in lines[0].split() if lines else ():
        name, equals, value = word.partition("=")
        if equals:
            fields.setdefault(name, value)
    if "JobState" not in fields:
        raise ValueError(f"no job {job_id} in what scontrol shows: {shown[:200]!r}")
    in_array = "ArrayTaskId" in fields
    return JobRecord(
        f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}" if in_array else job_id,
        fields["JobState"],
        fields.get("TimeLimit", "unknown"),
        _time(fields.get("EndTime")),
        _time(fields.get("PreemptTime")),
        int(fields.get("Restarts", "0")),
        "held" in str(fields.get("Reason")).lower(),  # job_requeued_in_held_state, JobHeldUser
    )


def _time(text: Optional[str]) -> Optional[datetime]:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S")  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None  # not there, "None", "Unknown", "N/A"


def step_cancelled(line: str) -> Optional[str]:
    """The reason in slurmstepd's line on a cancelled step, "" if it gives none; else None."""
    found = _STEP_CANCELLED.search(line)
    return (found[1] or "") if found else None


def judge(
    job: JobRecord,
    cancelled: Optional[str],
    now: datetime,
    warning_seconds: int,
    restarts: int,
    max_requeues: int,
    saved: bool = True,
) -> Verdict:
    """Decides what to do with a job whose ranks ended because they were warned.

    `saved`: all of them ended with EXIT_SAVED; otherwise the warning killed some, as it does before
    a command listens to it. `cancelled` is what `step_cancelled` found; `warning_seconds` the lead
    of the time-limit warning; `restarts` how often Slurm had started this job again when it began.
    """
    cause = _cause(job, cancelled, now, warning_seconds)
    outcome = "saved" if saved else "some ranks ended before they could save"
    if cause is None:
        return Verdict(f"cancelled; {outcome}; not requeued")
    if cancelled == "JOB REQUEUE" or (cancelled == "PREEMPTION" and job.restarts > restarts):
        when = f", once it is released: `scontrol release {job.name}`" if job.held else ""
        return Verdict(f"{cause}; {outcome}; Slurm runs it again{when}")
    if cause == ASKED and not saved:
        return Verdict(f"ended by a signal that Slurm knows nothing of; {outcome}")
    if restarts >= max_requeues:
        return Verdict(
            f"{cause}; {outcome}; not requeued, as it was {restarts} times already "
            f"(--max-requeues {max_requeues}): submit it again to continue"
        )
    return Verdict(f"{cause}; {outcome}; requeue {restarts + 1} of {max_requeues}", requeue=True)


def _cause(
    job: JobRecord, cancelled: Optional[str], now: datetime, warning_seconds: int
) -> Optional[str]:
    """Why the job was warned, in words; None if it was cancelled."""
    if cancelled == "TIME LIMIT":
        return f"time limit ({job.time_limit}) reached"
    if cancelled == "JOB REQUEUE":
        return "requeued by scontrol"
    if cancelled == "PREEMPTION" or (job.state == "RUNNING" and job.preempted):
        return "preempted by another job"
    if cancelled is not None or job.state != "RUNNING":
        return None
    left = (job.end - now).total_seconds() if job.end else float("inf")
    if left <= warning_seconds + SIGNAL_EARLY_SECONDS:
        return f"time limit ({job.time_limit}) ends it in {left:.0f} s"
    return ASKED

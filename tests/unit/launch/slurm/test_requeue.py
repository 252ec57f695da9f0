"""Whether a warned job requeues itself, for each way in which Slurm ends jobs."""

from datetime import datetime, timedelta

import pytest

from launch.slurm.requeue import JobRecord, judge, parse_job, step_cancelled

NOW = datetime(2026, 11, 22, 12, 0, 0)


def record(state="RUNNING", left=3600.0, preempted=False, restarts=0):
    end = NOW + timedelta(seconds=left)
    return JobRecord("7", state, "01:00:00", end, NOW if preempted else None, restarts)


CASES = [
    # job, what slurmstepd said of the step, requeue?, words of the log line
    (record(left=55), None, True, "time limit (01:00:00) ends it in 55 s"),
    # Slurm may warn up to a minute early.
    (record(left=120), None, True, "time limit (01:00:00) ends it in 120 s"),
    (record(left=121), None, True, "asked to save (SIGUSR1 or SIGTERM)"),
    (record(preempted=True), None, True, "preempted by another job"),
    (record(preempted=True), "", True, "preempted by another job"),
    (record(), None, True, "asked to save (SIGUSR1 or SIGTERM)"),
    (record()._replace(end=None), None, True, "asked to save (SIGUSR1 or SIGTERM)"),
    (record("COMPLETING", left=0), "TIME LIMIT", True, "time limit (01:00:00) reached"),
    (
        record("COMPLETING"),
        "JOB REQUEUE",
        False,
        "requeued by scontrol; saved; Slurm runs it again",
    ),
    (
        record("PENDING")._replace(held=True),  # scontrol requeuehold
        "JOB REQUEUE",
        False,
        "requeued by scontrol; saved; Slurm runs it again, once it is released: "
        "`scontrol release 7`",
    ),
    (
        record("COMPLETING", restarts=1),
        "PREEMPTION",
        False,
        "preempted by another job; saved; Slurm runs it again",
    ),
    (record("COMPLETING"), "PREEMPTION", True, "preempted by another job"),  # PreemptMode=CANCEL
    (record("COMPLETING", left=0), "", False, "cancelled; saved; not requeued"),
    (record("COMPLETING", left=0), None, False, "cancelled; saved; not requeued"),
    (record(), "", False, "cancelled; saved; not requeued"),  # scancel JOB.STEP
]


@pytest.mark.parametrize(("job", "cancelled", "requeue", "words"), CASES)
def test_verdicts(job, cancelled, requeue, words):
    verdict = judge(job, cancelled, NOW, warning_seconds=60, restarts=0, max_requeues=5)
    assert verdict.requeue is requeue
    more = "; saved; requeue 1 of 5" if requeue else ""
    assert verdict.message == words + more


def test_cap():
    last = judge(record(left=10), None, NOW, 60, restarts=4, max_requeues=5)
    assert last.requeue
    assert last.message == "time limit (01:00:00) ends it in 10 s; saved; requeue 5 of 5"
    over = judge(record(left=10), None, NOW, 60, restarts=5, max_requeues=5)
    assert not over.requeue
    assert over.message == (
        "time limit (01:00:00) ends it in 10 s; saved; not requeued, as it was 5 times already "
        "(--max-requeues 5): submit it again to continue"
    )


def test_warned_before_the_command_listens():
    """Preempted in its first seconds, a job must not be lost; a stray kill is no reason."""
    early = judge(record(preempted=True), None, NOW, 60, 0, 5, saved=False)
    assert early.requeue
    unsaved = "some ranks ended before they could save"
    assert early.message == f"preempted by another job; {unsaved}; requeue 1 of 5"
    stray = judge(record(), None, NOW, 60, 0, 5, saved=False)
    assert not stray.requeue
    assert stray.message == f"ended by a signal that Slurm knows nothing of; {unsaved}"


def test_scontrols_answer():
    shown = (
        "JobId=2 JobName=a=b JobState=RUNNING Reason=None TimeLimit=00:01:00 "
        "EndTime=2026-11-22T21:56:11 PreemptEligibleTime=2026-11-22T21:55:11 PreemptTime=None"
    )
    assert parse_job(shown, "2") == JobRecord(
        "2", "RUNNING", "00:01:00", datetime(2026, 11, 22, 21, 56, 11), None, 0
    )
    late = "JobId=2 JobState=X Restarts=3 PreemptTime=2026-11-22T21:56:11"
    assert parse_job(late, "2") == JobRecord(
        "2", "X", "unknown", None, datetime(2026, 11, 22, 21, 56, 11), 3
    )
    for reason, held in (("job_requeued_in_held_state", True), ("JobHeldUser", True), ("X", False)):
        assert parse_job(f"{late} Reason={reason}", "2").held is held
    with pytest.raises(ValueError, match="^no job 2 in what scontrol shows: 'slurm_load"):
        parse_job("slurm_load_jobs error: Invalid job id specified", "2")
    with pytest.raises(ValueError, match="scontrol shows: '8{200}'$"):
        parse_job("8" * 300, "2")


def test_a_task_of_an_array_is_found_among_the_others():
    """Asked for by the number of the last one, scontrol shows, and requeues, the whole array."""
    shown = "".join(
        f"JobId={job} ArrayJobId=8 ArrayTaskId={task} JobState={state}\n"
        for job, task, state in ((10, 0, "COMPLETED"), (8, 1, "RUNNING"), (9, 3, "PENDING"))
    )
    job = parse_job(shown, "8")
    assert (job.name, job.state) == ("8_1", "RUNNING")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("slurmstepd-n1: error: *** STEP 4.0 ON n1 CANCELLED AT 2026-11-22T21:54:18 ***", ""),
        (
            "slurmstepd: error: *** STEP 5.0 ON n1 CANCELLED AT 2026-11-22T21:54:53 "
            "DUE TO TIME LIMIT ***",
            "TIME LIMIT",
        ),
        ("slurmstepd: error: *** JOB 5 ON n1 CANCELLED AT 2026-11-22T21:54:53 ***", None),
        ("epoch 3 loss 0.2", None),
    ],
)
def test_slurmstepds_line(line, reason):
    assert step_cancelled(line) == reason

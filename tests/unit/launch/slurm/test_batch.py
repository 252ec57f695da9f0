"""The batch step and the submission against stand-ins for Slurm's commands.

test_slurm.py runs both on a real Slurm; here the command lines and the answers are in sight.
"""

import os
import pwd
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from launch.slurm import batch, submit

ROOT = Path(__file__).parents[4]
RUNNING = "JobId=7 JobState=RUNNING TimeLimit=01:00:00 EndTime=Unknown PreemptTime={preempted}"


@pytest.fixture
def slurm(tmp_path):
    """Runs `python -m launch` where the given shell scripts are Slurm's commands."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def run(*arguments, env=None, stdout=subprocess.PIPE, **programs):
        for name, script in programs.items():
            program = folder / name
            program.write_text(f"#!/bin/bash\n{script}\n")
            program.chmod(0o755)
        return subprocess.run(
            [sys.executable, "-m", "launch", *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "PATH": f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin",
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "n[1-2]",
                **(env or {}),
            },
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def job(slurm, srun, scontrol="exit 1", **env):
    return slurm("slurm-job", "--", "srun", "--label", srun=srun, scontrol=scontrol, env=env)


def test_rank_0_is_shown_bare_and_others_with_their_rank(slurm):
    done = job(slurm, "echo '0: {\"loss\": 1}'; echo ' 1: hm'; echo 'no label'")
    assert done.returncode == 0
    assert done.stdout == '{"loss": 1}\n[1] hm\nno label\n'


def test_each_step_gets_a_secret_of_its_own(slurm):
    tokens = {job(slurm, "echo 0: $LAUNCH_TOKEN").stdout for _ in range(2)}
    assert len(tokens) == 2
    assert all(len(token.strip()) == 32 for token in tokens)


UNCONNECTED = """
touch {place}/$LAUNCH_TOKEN
echo "0: step $LAUNCH_STEP"
echo "1: what():  gloo/transport/tcp/pair.cc:799] connect [10.0.0.1]:384: Connection refused" >&2
[ $(ls {place} | wc -l) -gt {fails} ] && exit 0
echo 'srun: error: n2: task 1: Aborted' >&2; exit 134
"""  # Gloo's own words


SUSPENDED = """
touch {place}/$LAUNCH_TOKEN
echo "0: step $LAUNCH_STEP"
echo "srun: got SIGCONT" >&2
echo "1: Horovod background loop uncaught exception: Timed out waiting 30000ms for recv" >&2
[ $(ls {place} | wc -l) -gt {fails} ] && exit 0
echo 'srun: error: n2: task 1: Exited with exit code 1' >&2; exit 1
"""


@pytest.mark.parametrize(
    ("said", "fails", "code", "starts"),
    [
        (UNCONNECTED, 0, 0, 1),
        (UNCONNECTED, 1, 0, 2),
        (UNCONNECTED, 9, 134, 2),
        (SUSPENDED, 2, 0, 3),
        (SUSPENDED, 99, 1, 11),  # as many times as it may be requeued
        (SUSPENDED.replace("got SIGCONT", "hm"), 1, 1, 1),
        (SUSPENDED.replace("Horovod background loop uncaught exception", "hm"), 1, 1, 1),
    ],
)
def test_ranks_that_could_not_connect_are_started_again(slurm, tmp_path, said, fails, code, starts):
    place = tmp_path / "steps"
    place.mkdir()
    done = job(slurm, said.format(place=place, fails=fails))
    assert done.returncode == code
    assert len(list(place.iterdir())) == starts
    assert done.stdout == "step 0\n" * starts  # for `--resume none`, which is for the first
    assert done.stderr.count("; starting them ") == starts - 1
    assert ("launch: rank 1 on n2: " in done.stderr) == (code != 0)


def test_a_warning_to_the_batch_step_alone_reaches_the_ranks(slurm):
    """As `scancel --batch --signal=USR1` gives it: srun, which hands signals on, gets none."""
    warned = "trap 'echo 0: saved; exit 85' USR1; for i in {1..50}; do kill -USR1 $PPID; sleep 0.1"
    done = job(slurm, f"{warned}; done; exit 1", f"echo {RUNNING.format(preempted='None')}")
    assert (done.returncode, done.stdout) == (85, "saved\n")


@pytest.mark.parametrize("option", ["--save-seconds=10000", "--max-requeues=99999"])
def test_what_submission_allows_the_job_takes_too(slurm, option):
    shown = slurm("slurm", option, "--dry-run", "--", "true").stdout
    options = re.search(r"slurm-job (.*) -- ", shown)[1].split()
    assert slurm("slurm-job", *options, "--", "true").returncode == 0


def test_the_rank_that_tells_the_cause_is_named(slurm):
    done = job(
        slurm,
        "echo '0: MXNetError: Horovod has been shut down.' >&2; echo '1: bad record' >&2;"
        "echo 'srun: error: n1: tasks 0,2: Exited with exit code 1' >&2;"
        "echo 'srun: error: n2: task 1: Exited with exit code 3' >&2; exit 3",
    )
    assert done.returncode == 3
    assert done.stderr.endswith(
        "launch: last lines of rank 1, which failed:\n    bad record\n"
        "launch: rank 1 on n2: Exited with exit code 3\n"
    )


def test_ranks_that_ended_long_before_the_others_are_named(slurm):
    """Slurm 22.05's own lines, of a rank that ends with 0 before the others' hvd.init()."""
    said = (
        "srun: First task exited 5s ago",
        "srun: StepId=13.0 task 0: running",
        "srun: StepId=13.0 tasks 1,3-5: exited",
        "slurmstepd-n1: error: *** STEP 13.0 ON n1 CANCELLED AT 2026-11-23T20:27:27 ***",
        "srun: error: n1: task 0: Killed",
    )
    speak = "; ".join(f"echo '{line}' >&2" for line in said)
    words = "launch: rank 1,3-5 ended without an error 5 s before srun --wait ended the others; "
    assert words in job(slurm, f"{speak}; exit 137").stderr.splitlines()[-1]
    failed = "echo 'srun: error: n2: task 3: Exited with exit code 1' >&2"
    assert words not in job(slurm, f"{failed}; {speak}; exit 137").stderr


def test_a_rank_that_srun_ended_after_the_others_had_failed_is_named(slurm):
    """Slurm 22.05's own lines, of a rank held by SIGSTOP; its peers lost it."""
    said = (
        "0: Horovod has been shut down",
        "srun: error: n1: task 0: Exited with exit code 1",
        "srun: First task exited 120s ago",
        "srun: StepId=29.0 task 1: running",
        "srun: StepId=29.0 task 0: exited abnormally",
        "srun: error: n2: task 1: Killed",
    )
    speak = "; ".join(f"echo '{line}' >&2" for line in said)
    assert job(slurm, f"{speak}; exit 137").stderr.splitlines()[-1] == (
        "launch: rank 1 on n2: Killed by srun --wait, 120 s after the first rank had ended"
    )


def test_a_rank_that_ended_before_init_is_named_not_those_that_waited(slurm):
    """Slurm 22.05's own lines; a rank that exits with 0 is not among them."""
    ended = "echo 'srun: error: n1: task {}: {}' >&2; "
    aborted = "echo '{0}: what():  HTTP request failed.' >&2; " + ended.format("{0}", "Aborted")
    said = "rank 1 ended before hvd.init(), where others wait for it"
    speak = f"echo '0: launch: {said}' >&2; {aborted.format(0)} exit 134"
    assert job(slurm, speak).stderr.splitlines()[-1] == f"launch: {said}"
    # The store ends with rank 0 and cannot say it.
    last = job(slurm, f"{aborted.format(2)} exit 134").stderr.splitlines()[-1]
    assert last == "launch: rank 0 ended before hvd.init(), where others wait for it"
    failed = "echo '1: bad record' >&2; " + ended.format(1, "Exited with exit code 3")
    last = job(slurm, failed + speak).stderr.splitlines()[-1]
    assert last == "launch: rank 1 on n1: Exited with exit code 3"


def test_a_lost_node_is_named_not_the_ranks_that_lost_it(slurm):
    done = job(
        slurm,
        "echo '0: Aborted' >&2; echo 'srun: error: n1: task 0: Aborted' >&2;"
        "echo 'srun: error: Node failure on n2' >&2; exit 134",
    )
    assert done.returncode == 134
    last = done.stderr.splitlines()[-1]
    assert last == "launch: n2 was lost while its ranks ran; Slurm requeues the job"


@pytest.mark.parametrize(
    ("ending", "code", "requeued", "words"),
    [
        ("Exited with exit code 85", 85, True, "preempted by another job; saved; requeue 1 of 10"),
        ("Terminated", 143, True, "some ranks ended before they could save; requeue 1 of 10"),
        ("Exited with exit code 1", 1, False, "rank 0 on n1: Exited with exit code 1"),
    ],
)
def test_a_preempted_job_is_requeued_unless_it_failed(
    slurm, tmp_path, ending, code, requeued, words
):
    shown = RUNNING.format(preempted="2026-11-22T12:00:00")
    asked = tmp_path / "asked"
    done = job(
        slurm,
        f"echo 'srun: error: n1: task 0: {ending}' >&2; exit {code}",
        f"[ $1 = show ] && echo {shown} || echo $* > {asked}",
    )
    assert done.returncode == code
    assert words in done.stderr
    assert asked.exists() == requeued
    if requeued:
        assert asked.read_text() == "requeue 7\n"


def test_a_refused_requeue_is_reported(slurm):
    shown = RUNNING.format(preempted="None")
    scontrol = f"[ $1 = show ] && echo {shown} || {{ echo Access denied >&2; exit 1; }}"
    done = job(slurm, "exit 85", scontrol)
    assert done.returncode == 85
    assert done.stderr.endswith(
        "launch: job 7 is not requeued: scontrol requeue 7 failed: Access denied; to continue it, "
        "`scontrol requeue 7` once Slurm answers, or submit it again\n"
    )


def test_a_controller_that_is_silent_for_a_moment_is_asked_again(slurm, tmp_path):
    shown = RUNNING.format(preempted="None")
    silent = "{ echo Socket timed out on send/recv operation >&2; exit 1; }"
    first = f"[ -e {tmp_path}/$1 ] || {{ touch {tmp_path}/$1; {silent}; }}"
    done = job(
        slurm, "exit 85", f"{first}; [ $1 = show ] && echo {shown} || echo > {tmp_path}/sent"
    )
    assert done.returncode == 85
    assert done.stderr.endswith("saved; requeue 1 of 10\n")
    assert (tmp_path / "sent").exists()


def test_a_controller_that_stays_silent_is_reported(monkeypatch, tmp_path):
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked\necho no answer >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(batch, "PAUSES", (0, 0))
    with pytest.raises(OSError, match="^scontrol show job 7 failed: no answer$"):
        batch._scontrol("show", "job", "7")
    assert (tmp_path / "asked").read_text() == "asked\n" * 3


def test_a_job_that_slurm_does_not_know_is_reported(slurm):
    done = job(slurm, "exit 85", "echo -e 'Invalid job id specified \\xe9' >&2; exit 1")
    assert done.returncode == 85
    assert "launch: job 7 is not requeued: scontrol show job -o 7 failed: Invalid" in done.stderr


def test_what_is_set_up_reaches_the_ranks_where_sbatch_exports_nothing(slurm):
    """`sbatch --export=NONE` leaves SLURM_EXPORT_ENV=NONE, by which srun would do the same."""
    assert job(slurm, "echo 0: $SLURM_EXPORT_ENV", SLURM_EXPORT_ENV="NONE").stdout == "ALL\n"


def test_times_are_asked_for_as_they_are_read(slurm):
    """Many set SLURM_TIME_FORMAT=relative, for squeue; a preemption would not be seen as one."""
    time = '$([ "$SLURM_TIME_FORMAT" = standard ] && echo 2026-11-22T)12:00:00'
    shown = RUNNING.format(preempted=time)
    done = job(slurm, "exit 85", f"echo {shown}", SLURM_TIME_FORMAT="relative")
    assert "preempted by another job; saved; requeue 1 of 10" in done.stderr


def test_the_script_is_what_sbatch_gets_and_follow_returns_the_jobs_code(slurm, tmp_path):
    log = tmp_path / "log"
    done = slurm(
        "slurm", "--follow", "--log", str(log), "--", "true",
        sbatch=f"[ $1 = --parsable ] && cat > {tmp_path}/script && echo said > {log} && echo 9",
        scontrol="echo JobId=9 JobState=FAILED Reason=NonZeroExitCode ExitCode=3:0",
    )  # fmt: skip
    assert done.stdout == f"job 9 is submitted; its log: {log}\nsaid\n"
    assert done.returncode == 3
    assert "#SBATCH --requeue\n" in (tmp_path / "script").read_text()


def test_a_word_of_any_bytes_reaches_the_job_as_it_is(slurm, tmp_path):
    word = os.fsdecode(b"caf\xe9")
    utf8 = {"LC_ALL": "C.UTF-8"}
    done = slurm("slurm", "--", word, sbatch=f"cat > {tmp_path}/script; echo 9", env=utf8)
    assert done.returncode == 0, done.stderr
    assert b"\n    'caf\xe9'\n" in (tmp_path / "script").read_bytes()
    with open(tmp_path / "shown", "w") as shown:
        slurm("slurm", "--dry-run", "--", word, env=utf8, stdout=shown)
    assert b"\n    'caf\xe9'\n" in (tmp_path / "shown").read_bytes()


def test_options_override_the_users_sbatch_variables(slurm):
    """Words of sbatch's command line win over these, and these over the script (test_slurm.py)."""
    done = slurm(
        "slurm", "--partition", "gpu", "--constraint", "a100&nvlink", "--log", "/tmp/log", "--",
        "true", sbatch='shift; printf "%s|" "$@" >&2; exit 1',
    )  # fmt: skip
    assert done.stderr == (
        "error: sbatch refused the job: --job-name=train|--nodes=1|--ntasks-per-node=1|"
        "--constraint=a100&nvlink|--partition=gpu|--output=/tmp/log|--open-mode=append|"
        "--signal=USR1@60|--requeue|\n"
    )


def test_a_job_that_another_one_submits_gets_nothing_of_its_allocation(slurm):
    """Its srun would take SLURM_GPUS_PER_TASK for an option; its requeues are counted anew."""
    of_the_job = {"SLURM_RESTART_COUNT": "10", "SLURM_GPUS_PER_TASK": "1"}
    done = slurm(
        "slurm", "--", "true",
        sbatch="env | grep ^SLURM_ >&2; exit 1",
        env={**of_the_job, "SLURM_CONF": "/etc/ours.conf"},
    )  # fmt: skip
    assert done.stderr == "error: sbatch refused the job: SLURM_CONF=/etc/ours.conf\n"


def test_a_sites_sbatch_may_say_more_before_the_id(slurm):
    banner = "echo '--> Verifying your account ... OK'; echo '9;gpu'"
    done = slurm("slurm", "--log", "/tmp/log-%j", "--", "true", sbatch=banner)
    assert done.stdout == "job 9 is submitted; its log: /tmp/log-9\n"


def test_the_logs_folder_is_made_where_it_can_be(slurm, tmp_path):
    log = tmp_path / "logs" / "of" / "mine"
    done = slurm("slurm", "--log", str(log), "--", "true", sbatch="echo 9")
    assert (done.returncode, done.stderr) == (0, "")
    assert log.parent.is_dir()
    log.touch()
    done = slurm("slurm", "--log", str(log / "log"), "--", "true", sbatch="echo 9")
    assert done.returncode == 0
    assert "the log's folder cannot be made here" in done.stderr


def test_a_submission_counts_where_its_message_cannot_be_written(slurm):
    """A script that is told of a failure would submit the job again."""
    with open("/dev/full", "w") as full:
        done = slurm("slurm", "--log", "/tmp/log", "--", "true", sbatch="echo 9", stdout=full)
    assert done.returncode == 0
    assert done.stderr == (
        "launch: job 9 is submitted; its log: /tmp/log (stdout: No space left on device)\n"
    )


def test_the_logs_name_is_what_sbatch_makes_of_it(slurm, tmp_path):
    """As Slurm 22.05 does: `%5j` pads; names are not padded."""
    user = pwd.getpwuid(os.getuid()).pw_name
    log = f"{tmp_path}/%5j.%A.%9x.%u.%%j"
    done = slurm("slurm", "--log", log, "--", "true", sbatch="echo 9")
    assert done.stdout == f"job 9 is submitted; its log: {tmp_path}/00009.9.train.{user}.%j\n"
    done = slurm("slurm", "--log", f"{tmp_path}/%j-%N", "--", "true", sbatch="echo 9")
    assert done.stdout == f"job 9 is submitted; its log: {tmp_path}/9-%N\n"


def test_an_array_has_a_log_for_each_task(slurm, tmp_path):
    """Their ids differ: none of them is the one that sbatch prints."""
    site = tmp_path / "site.yaml"
    site.write_text("sbatch: [--array=0-1]\n")
    options = ["--site", str(site), "--log", f"{tmp_path}/%x-%j-%A_%a"]
    done = slurm("slurm", *options, "--", "true", sbatch="echo 9")
    assert done.stdout == f"job 9 is submitted; its log: {tmp_path}/train-%j-9_%a\n"
    done = slurm("slurm", "--follow", *options, "--", "true", sbatch=f"touch {tmp_path}/submitted")
    assert done.returncode == 2
    assert "--follow cannot know the log's name before the job runs" in done.stderr
    assert not (tmp_path / "submitted").exists()


def test_a_log_that_cannot_be_followed_is_refused_before_the_job_is_submitted(slurm, tmp_path):
    log = f"{tmp_path}/%j-%N"
    done = slurm("slurm", "--follow", "--log", log, "--", "true", sbatch=f"touch {tmp_path}/sent")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --follow cannot know the log's name before the job runs, {tmp_path}/0-%N: it "
        "knows %j, %A, %x and %u, and no log of the tasks of --array\n"
    )
    assert not (tmp_path / "sent").exists()


@pytest.mark.parametrize("stdout", ["a closed pipe", "/dev/full"])
def test_the_job_goes_on_when_its_log_cannot_be_shown(monkeypatch, tmp_path, capsys, stdout):
    (tmp_path / "log").write_text("said")
    monkeypatch.setattr(submit, "_job", lambda _: {"JobState": "RUNNING", "Reason": "None"})
    read, write = os.pipe()
    os.close(read)
    with suppress(OSError), open(write if stdout == "a closed pipe" else stdout, "w") as target:
        monkeypatch.setattr(sys, "stdout", target)
        assert submit.follow("9", tmp_path / "log") == 130
    assert "job 9 keeps running; end it with `scancel 9`" in capsys.readouterr().err


def test_a_job_is_followed_through_states_that_pass(monkeypatch, tmp_path):
    """As Slurm 22.05 shows `scancel --signal=CONT`, a resize and `scontrol requeuehold`."""
    states = ["RUNNING", "SIGNALING", "RESIZING", "REQUEUE_HOLD", "SPECIAL_EXIT", "COMPLETED"]
    shown = iter([{"JobState": s, "Reason": "None", "ExitCode": "0:0"} for s in states])
    monkeypatch.setattr(submit, "_job", lambda _: next(shown))
    monkeypatch.setattr(submit, "POLL_SECONDS", 0)
    assert submit.follow("9", tmp_path / "log") == 0
    assert list(shown) == []


def test_a_refused_submission_is_one_line(slurm):
    done = slurm(
        "slurm", "--account", "nobody", "--", "true",
        sbatch="echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "error: sbatch refused the job: Batch job submission failed: Invalid account\n"
    )

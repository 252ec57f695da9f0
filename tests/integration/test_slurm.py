"""launch on a real two-node Slurm: ranks, submission, log, requeue, cancel, faults at the start.

The jobs run concurrently where they can, so that the waiting that Slurm does (a requeued job
begins after some seconds, a time limit is a minute) is shared.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import documented
from tests.waiting import wait_until

from .commands import SMALL
from .slurm_cluster import SlurmCluster, why_not

ROOT = Path(__file__).parents[2]
STANDIN = Path(__file__).with_name("standin.py")
SHOW_FACTS = "env | grep ^HOROVOD_ | sort | tr '\\n' ' '; echo"

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def launch(cluster, *arguments, env=None, check=True, timeout=120):
    """`python -m launch ...` as a user of the cluster types it."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=ROOT,
        env={**cluster.environment, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout
    return done


class Job:
    """A job submitted with `python -m launch slurm` that runs the stand-in in `folder`."""

    def __init__(self, cluster, folder, steps, *options, command=None):
        self.cluster, self.folder, self.log = cluster, folder, folder / "log"
        folder.mkdir(parents=True, exist_ok=True)
        command = command or ["python", str(STANDIN), str(folder), str(steps), "0.1"]
        done = launch(cluster, "slurm", "--log", str(self.log), *options, "--", *command)
        self.id = re.search(r"^job (\d+) is submitted", done.stdout, re.M)[1]

    def text(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, pattern, seconds=90):
        """Waits until the log matches; the match."""

        def otherwise():
            queue = self.cluster.run("squeue", "-o", "%i %j %T %r", check=False)
            return f"no {pattern!r} in the log of job {self.id}:\n{self.text()}\n{queue}"

        return wait_until(lambda: re.search(pattern, self.text(), re.M), otherwise, seconds)

    def wait_for_step(self, steps=1):
        """Waits until so many more steps are done than now."""
        goal = len(self.losses()) + steps
        wait_until(lambda: len(self.losses()) >= goal, self.text)

    def wait_for_state(self, state):
        """Waits until Slurm says that the job is that."""
        wait_until(
            lambda: self.cluster.state(self.id) == state,
            lambda: (self.cluster.state(self.id), self.text()),
        )

    def losses(self):
        path = self.folder / "losses"
        return path.read_text().splitlines() if path.exists() else []


def uninterrupted(steps, ranks=2):
    """What the stand-in writes when nothing disturbs it."""
    each = ranks * (ranks + 1) // 2
    return [f"{k} {float(each * (k + 1) * (k + 2) // 2)}" for k in range(steps)]


# ---------------------------------------------------------------------------------- srun by hand


def said_by_tasks(shown):
    """Lines without srun's own, such as that it waits for resources."""
    return [line for line in shown.splitlines() if not line.startswith("srun: ")]


@pytest.mark.parametrize(
    ("options", "places"),
    [
        (["-N2", "-n3"], ["node1 0/2", "node1 1/2", "node2 0/1"]),
        (["-N2", "-n3", "-mcyclic"], ["node1 0/2", "node2 0/1", "node1 1/2"]),
        (["-N1", "-n2", "-wnode2"], ["node2 0/2", "node2 1/2"]),
    ],
    ids=["block, unequal", "cyclic, unequal", "one node"],
)
def test_srun_gives_each_task_its_rank(cluster, options, places):
    shown = cluster.run(
        "srun", *options, "--label", sys.executable, "-m", "launch", "slurm-rank", "--",
        "bash", "-c", SHOW_FACTS,
    )  # fmt: skip
    lines = sorted(line.split(": ", 1) for line in said_by_tasks(shown))
    facts = [dict(word.split("=", 1) for word in text.split()) for _, text in lines]
    assert [f["HOROVOD_RANK"] for f in facts] == [str(i) for i in range(len(places))]
    assert [
        f"{f['HOROVOD_HOSTNAME']} {f['HOROVOD_LOCAL_RANK']}/{f['HOROVOD_LOCAL_SIZE']}"
        for f in facts
    ] == places
    several = len({p.split()[0] for p in places})
    for f in facts:
        assert int(f["HOROVOD_CROSS_SIZE"]) == (several if f["HOROVOD_LOCAL_RANK"] == "0" else 1)


def test_late_task_is_waited_for(cluster):
    command = f"{sys.executable} -m launch slurm-rank -- bash -c 'echo rank $HOROVOD_RANK'"
    shown = cluster.run(
        "srun", "-N2", "-n2", "bash", "-c", f'sleep $((SLURM_PROCID * 3)); exec {command}'
    )  # fmt: skip
    assert sorted(said_by_tasks(shown)) == ["rank 0", "rank 1"]


def test_missing_rank_is_named_within_the_start_timeout(cluster):
    command = f"{sys.executable} -m launch slurm-rank --start-timeout 2 -- true"
    shown = cluster.run(
        "srun", "-N2", "-n3", "--kill-on-bad-exit=0",
        "bash", "-c", f"[ $SLURM_PROCID = 1 ] && sleep 4 || exec {command}",
        check=False,
    )  # fmt: skip
    assert "2 of 3 ranks checked in within 2 s; missing: rank 1" in shown
    assert "task 0: Exited with exit code 1" in shown.replace("tasks 0,2", "task 0")


@pytest.mark.parametrize("early", [0, 1])
def test_rank_that_ends_before_init_is_named_at_once(cluster, tmp_path, early):
    command = (
        "import os, sys\n"
        f"if os.environ['HOROVOD_RANK'] == '{early}': sys.exit()\n"
        "import horovod.mxnet as hvd; hvd.init()"
    )
    site = tmp_path / "site.yaml"
    site.write_text("straggler_seconds: 90\n")
    done = launch(
        cluster, "slurm", "--site", str(site), "--nodes", "2", "--follow",
        "--log", str(tmp_path / "log"), "--", "python", "-c", command,
        check=False, timeout=60,
    )  # fmt: skip
    assert (
        f"launch: rank {early} ended before hvd.init(), where others wait for it\n" in done.stdout
    )
    assert done.returncode == 134  # SIGABRT, with which Horovod answers


def test_slurm_rank_outside_of_srun_says_how_to_use_it(cluster):
    done = launch(cluster, "slurm-rank", "--", "true", check=False)
    assert done.returncode == 2
    assert "SLURM_JOB_ID is not set: slurm-rank runs inside srun" in done.stdout


def test_srun_without_slurm_rank_says_what_is_missing(cluster, tmp_path):
    shown = cluster.run(
        "srun", "-N2", "-n2",
        sys.executable, "-m", "trainer", "train", *SMALL, f"output={tmp_path}/runs", check=False,
    )  # fmt: skip
    assert shown.count("error: 2 processes were started, but Horovod joins only 1") == 1
    assert "under srun put `python -m launch slurm-rank --` before the command" in shown
    assert not (tmp_path / "runs").exists()


def test_launchers_of_one_machine_under_srun_are_told_of_once(cluster):
    """They are allowed: each may run a job of its own."""
    shown = cluster.run(
        "srun", "-N2", "-n3", sys.executable, "-m", "launch", "local", "-n", "1", "--", "echo", "hi"
    )
    words = (
        "launch: srun has started 3 of these launchers, each with ranks of its own; for one job of "
        "all tasks: srun ... python -m launch slurm-rank -- COMMAND"
    )
    assert sorted(said_by_tasks(shown)) == ["[0] hi"] * 3 + [words]


def test_doctor_shows_a_row_for_each_node(cluster):
    """As its usage says; with `--ntasks-per-node=1` alone srun would start the job's four tasks."""
    help = subprocess.run([sys.executable, "-m", "launch", "doctor", "-h"], stdout=subprocess.PIPE)
    command = re.search(rb"\[(srun .*)\] python (.*)", help.stdout)
    line = f"{command[1].decode()} {sys.executable} {command[2].decode()}"
    shown = cluster.run("salloc", "-N2", "--ntasks-per-node=2", "bash", "-c", line, check=False)
    for name in ("node1", "node2"):
        assert re.search(rf"^(ok +{name} .*; cores [12]\b|(warn|FAIL) +{name} )", shown, re.M), (
            shown
        )
    link = r"^(ok|warn) +allreduce +2 ranks over \w+: [\d.]+ ms, [\d.]+ MB/s at 45 MB"
    assert re.search(link, shown, re.M)
    assert not list(ROOT.glob(".launch-doctor-*"))


# ---------------------------------------------------------------------------- submission, the log


def test_follow_shows_the_log_of_a_job_in_a_container(cluster, tmp_path):
    fake = tmp_path / "bin" / "apptainer"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/bash\necho "apptainer $1 $5" >&2\n'
        f'shift 5; shift; exec "{sys.executable}" "$@"\n'  # the image's `python`
    )
    fake.chmod(0o755)
    done = launch(
        cluster, "slurm", "--nodes", "2", "--container", "image.sif", "--follow",
        "--log", str(tmp_path / "the log-%j"),
        "--", "python", str(STANDIN), str(tmp_path), "5",
        env={"PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert "apptainer exec image.sif" in done.stdout
    assert "from step 0 with 2 ranks\n" in done.stdout
    assert "done: 45.0" in done.stdout
    assert re.search(r"job \d+ is COMPLETED", done.stdout)
    job_id = re.search(r"job (\d+) is submitted; its log: (.+)", done.stdout)
    assert job_id[2] == str(tmp_path / f"the log-{job_id[1]}")


def test_what_setup_loads_reaches_the_ranks_where_sbatch_exports_nothing(cluster, tmp_path):
    """`--export=NONE` is the rule at some sites; srun would take it from sbatch."""
    site = tmp_path / "site.yaml"
    site.write_text("sbatch: [--export=NONE]\nsetup: [export LOADED=modules]\n")
    done = launch(
        cluster, "slurm", "--site", str(site), "--nodes", "2", "--follow",
        "--log", str(tmp_path / "log"),
        "--", "bash", "-c", "echo $HOROVOD_RANK has $LOADED and a secret of ${#LAUNCH_TOKEN}",
    )  # fmt: skip
    for line in ("0 has modules and a secret of 32", "[1] 1 has modules and a secret of 32"):
        assert line in done.stdout.splitlines()


def test_options_override_the_users_variables_whatever_these_are_called(cluster, tmp_path):
    """Several exclude each other, and some have another name than the option."""
    given = {"TIMELIMIT": "99", "MEM_PER_CPU": "900M", "NO_REQUEUE": "1", "OUTPUT": "/tmp/nope"}
    given.update(ACCOUNT="theirs", SIGNAL="USR2@9", JOB_NAME="nope")
    done = launch(
        cluster, "slurm", "--time=5", "--mem=500M", "--log", str(tmp_path / "log"), "--follow",
        "--sbatch=--comment=ours", "--", "echo", "done",
        env={f"SBATCH_{name}": value for name, value in given.items()},
    )  # fmt: skip
    job = re.search(r"^job (\d+) is submitted", done.stdout, re.M)[1]
    fields = ("TimeLimit", "MinMemoryNode", "Requeue", "JobName", "Account", "Comment")
    found = [cluster.field(job, field) for field in fields]
    assert found == ["00:05:00", "500M", "1", "train", "theirs", "ours"]
    assert (tmp_path / "log").read_text().endswith("done\n")


def test_two_jobs_share_a_node(cluster, tmp_path):
    """The second runs from start to end while the first one does."""
    site = tmp_path / "site.yaml"
    site.write_text("sbatch: [--nodelist=node1]\n")
    options = ["--ranks-per-node", "2", "--site", str(site)]
    first = Job(cluster, tmp_path / "first", 600, *options)
    first.wait_for_step()
    second = Job(cluster, tmp_path / "second", 3, *options)
    second.wait_for("done: 18.0")
    first.wait_for_step()
    assert cluster.state(first.id) == "RUNNING"
    assert {cluster.field(job.id, "NodeList") for job in (first, second)} == {"node1"}
    cluster.run("scancel", first.id)
    saved = int(first.wait_for(r"saved at step (\d+)")[1])
    assert first.losses() == uninterrupted(saved)


def test_failing_rank_ends_the_job_and_is_named(cluster, tmp_path):
    failing = 'import os, sys; print("rank", os.environ["HOROVOD_RANK"]); sys.stdout.flush();'
    failing += 'sys.exit("no such record: 17") if os.environ["HOROVOD_RANK"] == "1" else None;'
    failing += "import time; time.sleep(600)"
    site = tmp_path / "site.yaml"
    site.write_text("straggler_seconds: 1\n")
    done = launch(
        cluster, "slurm", "--site", str(site), "--nodes", "2", "--follow",
        "--log", str(tmp_path / "log"), "--", "python", "-c", failing,
        check=False,
    )  # fmt: skip
    assert done.returncode not in (0, 85)
    assert re.search(
        r"last lines of rank 1, which failed:\n    rank 1\n    no such record: 17\n", done.stdout
    )
    assert "rank 1 on node2: Exited with exit code 1" in done.stdout


def test_refused_partition_and_missing_sbatch_are_one_line(cluster):
    done = launch(cluster, "slurm", "--partition", "hihg", "--", "true", check=False)
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    assert line.startswith("error: sbatch refused the job: ") and "partition" in line
    done = launch(cluster, "slurm", "--", "true", env={"PATH": "/nonexistent"}, check=False)
    assert done.returncode == 2
    assert "sbatch is not on this machine" in done.stdout


# ------------------------------------------------------------------------------ the documents' own


def test_the_documents_commands_train(cluster, tmp_path):
    """Each line as it stands there (tests/documented.py lowers numbers), all jobs at once."""
    fake = tmp_path / "bin" / "apptainer"
    fake.parent.mkdir()
    fake.write_text('#!/bin/bash\nwhile [[ $1 != *.sif ]]; do shift; done; shift; exec "$@"\n')
    fake.chmod(0o755)
    for name in ("configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    paths = [fake.parent, Path(sys.executable).parent, os.environ["PATH"]]
    environment = {
        **cluster.environment,
        "PATH": os.pathsep.join(map(str, paths)),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    small = "data.dataset=fashion_mnist_sample model.factory=tests.integration.nets:small"
    lines = documented.lines("slurm")
    assert {line.split()[0] for line in lines} == {"srun", "python"} and len(lines) >= 3
    typed = []
    for number, line in enumerate(lines):
        line = f"{line} {small} train.max_steps=3 name=run{number}"
        line = f"salloc --quiet -N2 -n2 {line}" if line.startswith("srun") else line
        typed.append(
            subprocess.Popen(
                ["bash", "-c", line],
                cwd=tmp_path,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    said = [process.communicate(timeout=120)[0] for process in typed]
    for number, (process, text) in enumerate(zip(typed, said)):
        assert process.returncode == 0, text
        log = re.search(r"^job (\d+) is submitted; its log: (.+)", text, re.M)
        if log:
            path = Path(log[2])
            wait_until(
                lambda path=path: path.exists() and "done: " in path.read_text(), path.read_text, 90
            )
        assert list((tmp_path / "runs" / f"run{number}").glob("checkpoints/step-00000003"))


# ---------------------------------------------------------------- warned, saved, requeued or not


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory):
    """Jobs that wait for Slurm for long, started together: time limit, requeue, capped requeue."""

    def job(name, steps, *options):
        return Job(cluster, tmp_path_factory.mktemp(name), steps, "--nodes=2", *options)

    jobs = {
        "time": job("time", 450, "--time=1", "--save-seconds=20"),
        "requeue": job("requeue", 60),
        "capped": job("capped", 600, "--max-requeues=1"),
    }
    for name in ("requeue", "capped"):
        jobs[name].wait_for_step(3)
    cluster.run("scontrol", "requeue", jobs["requeue"].id)
    cluster.run("scancel", "--signal=USR1", jobs["capped"].id)
    return jobs


def test_scancel_saves_and_does_not_requeue(cluster, jobs, tmp_path):
    job = Job(cluster, tmp_path, 600, "--nodes", "2")
    job.wait_for_step(3)
    cluster.run("scancel", job.id)
    job.wait_for(rf"launch: job {job.id}: cancelled; saved; not requeued")
    job.wait_for_state("CANCELLED")
    saved = int(job.wait_for(r"saved at step (\d+)")[1])
    assert job.losses() == uninterrupted(saved)
    assert cluster.field(job.id, "Restarts") == "0"


def test_requeues_are_capped(cluster, jobs):
    job = jobs["capped"]
    job.wait_for(r"asked to save \(SIGUSR1 or SIGTERM\); saved; requeue 1 of 1")
    job.wait_for(r"from step [1-9]\d* with 2 ranks")
    cluster.run("scancel", "--signal=USR1", job.id)
    job.wait_for(r"not requeued, as it was 1 times already \(--max-requeues 1\)")
    job.wait_for_state("FAILED")
    assert cluster.field(job.id, "ExitCode") == "85:0"


def test_scontrol_requeue_saves_and_slurm_runs_it_again(cluster, jobs):
    job = jobs["requeue"]
    job.wait_for(rf"launch: job {job.id}: requeued by scontrol; saved; Slurm runs it again")
    job.wait_for(r"from step [1-9]\d* with 2 ranks")
    job.wait_for("done:")
    assert job.losses() == uninterrupted(60)
    assert cluster.field(job.id, "Restarts") == "1"


def test_time_limit_saves_and_requeues(cluster, jobs):
    """Slurm checks for warnings every half minute, so this one comes 10 to 40 s after the start."""
    job = jobs["time"]
    job.wait_for(r"time limit \(00:01:00\) ends it in \d+ s; saved; requeue 1 of 10")
    saved = int(job.wait_for(r"saved at step (\d+)")[1])
    job.wait_for(rf"from step {saved} with 2 ranks")
    job.wait_for_step(3)
    cluster.run("scancel", job.id)
    job.wait_for_state("CANCELLED")
    steps = job.losses()
    assert len(steps) > saved
    assert steps == uninterrupted(len(steps))


def test_preempted_training_has_the_losses_of_an_undisturbed_one(cluster, tmp_path):
    """The real trainer: same weights, and the same loss at every step, none twice."""
    one_thread = {"OMP_NUM_THREADS": "1"}
    command = ["python", "-m", "trainer", "train", *SMALL, "monitor.every_steps=1"]
    command.append("train.epochs=8")
    with mock.patch.dict(cluster.environment, one_thread):
        requeued = tmp_path / "requeued"
        job = Job(
            cluster, tmp_path, 0, "--nodes=2", "--partition=low",
            command=[*command, f"output={requeued}"],
        )  # fmt: skip
    job.wait_for("images/s")
    high = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
        "--output=/dev/null", "--wrap", "sleep 1",
    )  # fmt: skip
    job.wait_for(rf"launch: job {job.id}: preempted by another job; saved; requeue 1 of 10")
    straight = tmp_path / "straight"
    local = ("local", "-n", "2", "--quiet", "--", *command, f"output={straight}")
    launch(cluster, *local, env=one_thread)
    job.wait_for("^done:")
    assert "resumes from" in job.text()
    assert cluster.state(high.strip()) == "COMPLETED"
    assert losses(requeued) == losses(straight)
    assert [step for step, _ in losses(requeued)] == list(range(1, 129))
    assert final_weights(requeued) == final_weights(straight)


def losses(output):
    """(step, loss) of each step in the run's event files."""
    events = EventAccumulator(str(output / "default" / "events"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss/train")]


def final_weights(output):
    (path,) = (output / "default" / "checkpoints").glob("step-00000128/model.params")
    return path.read_bytes()


# ------------------------------------------------------------------ ranks and nodes that are lost


def test_a_job_whose_ranks_could_not_connect_starts_them_once_more(cluster, tmp_path):
    """In Gloo's words, which a stranger makes it say (test_launch_local.py)."""
    unconnected = (
        f"begun={tmp_path}/begun.$SLURM_PROCID; [ -e $begun ] || {{ touch $begun; echo 'pair.cc] "
        "connect [10.0.0.1]:384: Connection refused' >&2; kill -ABRT $$; }; "
        f"exec python {STANDIN} {tmp_path} 3 0.1"
    )
    job = Job(cluster, tmp_path, 3, "--nodes", "2", command=["bash", "-c", unconnected])
    job.wait_for("launch: ranks could not connect to each other as they started; starting them on")
    job.wait_for_state("COMPLETED")
    assert job.losses() == uninterrupted(3)


def test_killed_rank_ends_the_job_and_is_named(cluster, tmp_path):
    job = Job(cluster, tmp_path, 600, "--nodes", "2")
    job.wait_for_step(3)
    cluster.rank_process(job.id, 1).kill()
    job.wait_for("launch: rank 1 on node2: Killed", seconds=30)
    job.wait_for_state("FAILED")


def test_dead_node_ends_the_job_and_is_named(cluster, tmp_path):
    cluster.kill_node("node2")
    try:
        job = Job(cluster, tmp_path, 5, "--nodes", "2")
        job.wait_for("launch: node2 could not start its ranks: Communication connection failure")
    finally:
        cluster.start_node("node2")

"""Job scripts compared to golden files, and invalid site files and options.

`UPDATE_GOLDEN=1 python -m pytest tests/unit/launch/slurm/test_script.py` writes the files anew.
"""

import os
import subprocess
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.slurm.script import JobOptions, job_options, read_site, render
from launch.slurm.submit import check_followable, log_path

GOLDEN = Path(__file__).with_name("golden")
ROOT = Path(__file__).parents[4]
COMMAND = ["python", "-m", "trainer", "train", "configs/fashion_mnist.yaml", "optimizer.lr=0.2"]

JOBS = {
    "cpu": JobOptions(nodes=2, cpus_per_rank=4),
    "gpu": JobOptions(nodes=4, gpus_per_node=8, time="02:00:00", partition="gpu"),
    "apptainer": JobOptions(
        nodes=2,
        gpus_per_node=4,
        container="ngc.sif",
        container_mounts=("/data:/data",),
        setup=("module load apptainer",),
        account="lab",
        max_requeues=3,
    ),
    "pyxis": JobOptions(
        gpus_per_node=1,
        container="nvcr.io#nvidia/mxnet:24.06-py3",
        container_runtime="pyxis",
        sbatch=("--constraint=h100",),
        srun=("--cpu-bind=cores",),
        save_seconds=300,
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_script_is_the_golden_one(name):
    made_by = ["python", "-m", "launch", "slurm", "--", *COMMAND]
    script = render(JOBS[name], COMMAND, Path("/home/me/my project"), "/opt/py/bin/python", made_by)
    golden = GOLDEN / f"job_{name}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(script)
    assert script == golden.read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("name", ["x\n#SBATCH --uid=0", "x\ntouch ran\n", "x\x1b[8m", "x\udcff"])
def test_no_folders_name_becomes_a_line_of_the_script(name):
    with pytest.raises(ValueError, match="working folder is .*printable"):
        render(JobOptions(), ["true"], Path("/home/me") / name, "python", [])
    with pytest.raises(ValueError, match="Python is .*printable"):
        render(JobOptions(), ["true"], Path("/home/me"), f"/opt/{name}/python", [])


def test_what_slurm_would_expand_in_a_folders_name_is_none_of_the_logs():
    script = render(JobOptions(), ["true"], Path("/home/50%j of me"), "python", [])
    assert "#SBATCH '--output=/home/50%%j of me/slurm-%j.log'" in script
    check_followable(script)
    assert log_path(script, "7") == Path("/home/50%j of me/slurm-7.log")
    with pytest.raises(ValueError, match="working folder is .*, and no "):
        render(JobOptions(), ["true"], Path("/home/a\\b"), "python", [])


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
@pytest.mark.parametrize("name", ["x:/etc", "x,/home:/mnt"])
def test_nor_a_mount_of_a_container(name, runtime):
    options = JobOptions(container="x.sif", container_runtime=runtime)
    with pytest.raises(ValueError, match="mounted .* without : and ,"):
        render(options, ["true"], Path("/home/me") / name, "python", [])
    assert name in render(JobOptions(), ["true"], Path("/home/me") / name, "python", [])


def test_a_container_sees_the_gpus_for_which_the_site_has_an_option_of_its_own():
    options = JobOptions(container="x.sif", sbatch=("--gres=gpu:4",))
    assert "apptainer exec --nv " in render(options, ["true"], Path("/home/me"), "python", [])


def test_a_word_of_the_command_is_no_option_of_the_job(tmp_path):
    """Slurm takes options from the lines before the first command alone."""
    script = render(JobOptions(), ["echo", "x\n#SBATCH --array=1-9"], tmp_path, "python", [])
    check_followable(script)


def test_words_survive_the_shell(tmp_path):
    words = ["a b", "it's", "$HOME", "", "new\nline", "*"]
    script = render(JobOptions(), ["printf", "%s|", *words], tmp_path, "echo", ["x\ny", "z"])
    said = subprocess.run(
        ["bash", "-c", script.replace("exec echo", "exec printf '%s|'")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    assert said.endswith("|".join([*words, ""]))


def test_nothing_runs_where_the_folder_is_missing(tmp_path):
    script = render(JobOptions(), ["true"], tmp_path / "gone", "echo", [])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{tmp_path}/gone: No such file or directory" in done.stderr


def test_site_defaults_and_command_line(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("partition: gpu\ngpus_per_node: 8\nsetup:\n  - module load cuda\n")
    options = job_options(read_site(site), {"partition": "short", "nodes": None})
    assert (options.partition, options.gpus_per_node, options.nodes) == ("short", 8, 1)
    assert options.setup == ("module load cuda",)
    assert options.tasks_per_node == 8


def test_the_example_site_file_is_valid():
    assert job_options(read_site(ROOT / "configs" / "site-example.yaml"), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "unknown key 'partitoin'; did you mean partition?"),
        ("nodes: many", "nodes: 'many' is given, allowed is a number from 1 to 99999"),
        ("setup: module load x", "setup: 'module load x' is given, allowed is a list of texts"),
        ("- a", "expected `key: value` lines"),
        ("a: [", "cannot read the site file"),
    ],
)
def test_wrong_site_file_is_one_line(tmp_path, text, message):
    site = tmp_path / "site.yaml"
    site.write_text(text)
    with pytest.raises(ValueError) as error:
        read_site(site)
    assert message in str(error.value)
    assert str(site) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "nodes: 0 is given, allowed is a number from 1 to 99999"),
        ({"gpus_per_node": -1}, "gpus_per_node: -1 is given, allowed is a number, or a type"),
        ({"ranks_per_node": 0}, "ranks_per_node: 0 is given"),
        ({"name": "a\nrm -rf b"}, "name: 'a\\nrm -rf b' is given, allowed is a text on one line"),
        ({"partition": ""}, "partition: '' is given"),
        ({"srun": ("",)}, "allowed is a list of texts on one line each"),
        ({"time": "2 hours"}, "allowed is minutes, HH:MM:SS or D-HH:MM:SS"),
        ({"container_runtime": "docker"}, "allowed is apptainer or pyxis"),
        (
            {"gpus_per_node": "a100:8", "gpus_per_task": 3},
            "gpus_per_node is a100:8 and gpus_per_task 3; 2 ranks on a node take 6",
        ),
        (
            {"gpus_per_node": 8, "gpus_per_task": 2, "ranks_per_node": 8},
            "8 ranks on a node take 16",
        ),
        ({"sbatch": ("--signal=USR2@90",)}, "sbatch: --signal is given; save_seconds is when"),
    ],
)
def test_wrong_option_is_named(options, message):
    with pytest.raises(ValueError) as error:
        JobOptions(**options)
    assert message in str(error.value)


def test_further_options_of_a_job_come_after_the_sites_and_win(tmp_path, monkeypatch, capsys):
    site = tmp_path / "site.yaml"
    site.write_text("sbatch: [--constraint=a100]\n")
    log = f"{tmp_path}/%x-%j"
    given = ["--sbatch=--dependency=afterok:7", f"--sbatch=--output={log}"]
    assert main(["slurm", "--site", str(site), *given, "--dry-run", "--", "true"]) == 0
    script = capsys.readouterr().out
    last = ["--requeue", "--constraint=a100", "--dependency=afterok:7", f"--output={log}"]
    assert script.index("\n".join(f"#SBATCH {option}" for option in last) + "\n\n")
    assert log_path(script, "9") == tmp_path / "train-9"


@pytest.mark.parametrize("time", ["30", "90:00", "02:00:00", "1-12:00:00", "2-0", "UNLIMITED"])
def test_slurms_time_formats(time):
    assert JobOptions(time=time).time == time


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        (["--gpus-per-node", "a100:4"], ["--ntasks-per-node=4", "--gpus-per-node=a100:4"]),
        (
            ["--gpus-per-task", "1", "--ranks-per-node", "4"],
            ["--ntasks-per-node=4", "--gpus-per-task=1"],
        ),
        (["--gpus-per-node", "8", "--gpus-per-task", "a100:2"], ["--ntasks-per-node=4"]),
        (["--gpus-per-task", "2"], ["--ntasks-per-node=1", "--gpus-per-task=2"]),
        (["--mem", "64G", "--exclusive"], ["--mem=64G", "--exclusive"]),
        (["--constraint", "a100&nvlink"], ["'--constraint=a100&nvlink'"]),
    ],
)
def test_what_gpu_jobs_ask_for_on_the_command_line(capsys, tmp_path, monkeypatch, given, lines):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAUNCH_SITE", raising=False)
    assert main(["slurm", "--dry-run", *given, "--", "true"]) == 0
    script = capsys.readouterr().out.splitlines()
    assert not {f"#SBATCH {line}" for line in lines} - set(script)


def test_a_site_may_ask_for_them_too(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("gpus_per_node: a100:4\nexclusive: true\nmem: 64G\n")
    assert read_site(site) == {"gpus_per_node": "a100:4", "exclusive": True, "mem": "64G"}
    site.write_text("exclusive: perhaps\n")
    with pytest.raises(ValueError, match="exclusive: 'perhaps' is given, allowed is true or false"):
        read_site(site)

"""Any site file and any command line of launch works or ends in one clear line."""

from __future__ import annotations

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch import __main__ as launch_entry
from launch.core.job import Outcome
from launch.local import local
from launch.slurm.script import JobOptions, job_options, read_site, render
from tests.bad_input import JSON, one_line

FIELDS = sorted(JobOptions.__dataclass_fields__)


@settings(max_examples=150)
@given(st.dictionaries(st.one_of(st.sampled_from(FIELDS), st.text(max_size=4)), JSON, max_size=3))
@example({"time": 30})
@example({"nodes": True})
@example({"ranks_per_node": [1]})
def test_any_site_file(tmp_path, site):
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(site), errors="replace")
    try:
        options = job_options(read_site(path), {})
        script = render(options, ["true"], tmp_path, "python", ["launch"])
    except ValueError as error:
        one_line(error)
    else:
        assert script.startswith("#!/bin/bash\n")


@settings(max_examples=50)
@given(st.binary(max_size=30))
def test_any_bytes_of_a_site_file(tmp_path, content):
    path = tmp_path / "site.yaml"
    path.write_bytes(content)
    try:
        read_site(path)
    except ValueError as error:
        one_line(error)


OPTIONS = {
    "local": "-n --kill-after --start-timeout --min-ranks --max-ranks --max-restarts "
    "--discover-every",
    "slurm": "--nodes --gpus-per-node --ranks-per-node --cpus-per-rank --time --partition "
    "--account --qos --name --log --container --container-runtime --save-seconds --max-requeues "
    "--site --gpus-per-task --mem --constraint",
    "slurm-rank": "--start-timeout",
    "slurm-job": "--save-seconds --max-requeues",
    "elastic-rank": "-n",
    "doctor": "-n",
}
VALUES = [
    "0",
    "1",
    "2",
    "-1",
    "1e9",
    "nan",
    "inf",
    "9" * 30,
    "",
    "x",
    "a\nb",
    "\0",
    "--",
    "1:00:00",
]


@st.composite
def launch_command_lines(draw):
    action = draw(st.sampled_from(sorted(OPTIONS)))
    value = st.one_of(st.sampled_from(VALUES), st.text(max_size=4))
    pairs = st.tuples(st.sampled_from(OPTIONS[action].split()), value)
    words = [word for pair in draw(st.lists(pairs, min_size=1, max_size=3)) for word in pair]
    return [action, *["--dry-run"] * (action == "slurm"), *words, "--", "true"]


@settings(max_examples=150)
@given(launch_command_lines())
@example(["local", "-n", "9" * 30, "--", "true"])
@example(["local", "-n", "1", "--start-timeout", "inf", "--", "true"])
@example(["slurm", "--dry-run", "--name", "a\nrm -rf b", "--", "true"])
def test_any_command_line_of_launch(tmp_path_factory, monkeypatch, capsys, arguments):
    """Nothing is started: what is given is judged before."""
    folder = tmp_path_factory.mktemp("empty")
    capsys.readouterr()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(local, "_run_once", lambda *_: Outcome(0))
    try:
        code = launch_entry.main(arguments)
    except SystemExit as end:  # argparse's own
        code = end.code
    shown, said = capsys.readouterr()
    if code == 0:
        head = shown.split("\n\n")[0].splitlines()
        assert arguments[0] == "local" or all(line.startswith("#") for line in head)
    else:
        assert code == 2
        assert said.startswith("error: ") and len(said.splitlines()) == 1 and len(said) > 17
    assert list(folder.iterdir()) == []

"""Every command keeps its own exit code, whatever becomes of stdin, stdout and stderr.

Python's last flush of a stdout that cannot be written makes any exit code 120, unless
PYTHONUNBUFFERED is set; the environment here is a new user's.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence

import pytest

from .commands import ROOT, SMALL

PYTHON = sys.executable
STREAMS = ("closed", "full", "a full stdout", "a reader that has gone", "a terminal that has gone")
LOST = "the standard output cannot be written: No space left on device\n"


def trainer(*arguments: str) -> List[str]:
    return [PYTHON, "-m", "trainer", *arguments]


def launch(*arguments: str) -> List[str]:
    return [PYTHON, "-m", "launch", *arguments]


class Case(NamedTuple):
    """A command, its exit code, and that where its answer finds no room (by default the same)."""

    command: Sequence[str]
    code: int = 0
    full: Optional[int] = None
    env: Dict[str, str] = {}  # noqa: RUF012 - a default of a named tuple


def answer(*command: str) -> Case:
    """A command that is run for what it prints: losing that on a full disk is an error."""
    return Case(command, full=2)


CASES = {
    "trainer --help": Case(trainer("--help")),
    "trainer train --help": Case(trainer("train", "--help")),
    "trainer nonesuch": Case(trainer("nonesuch"), 2),
    "trainer config": answer(*trainer("config")),
    "trainer config, wrong": Case(trainer("config", "nonesuch=1"), 2),
    "table": answer(PYTHON, "-m", "trainer.config.table"),
    "launch --help": Case(launch("--help")),
    "launch local --help": Case(launch("local", "--help")),
    "launch nonesuch": Case(launch("nonesuch"), 2),
    "local": Case(launch("local", "-n", "2", "--", "bash", "-c", "echo hm; echo hm >&2")),
    "local, failed": Case(launch("local", "-n", "2", "--", "bash", "-c", "echo hm; exit 3"), 3),
    "local --quiet": Case(launch("local", "-n", "2", "--quiet", "--", "bash", "-c", "exit 85"), 85),
    "slurm": answer(*launch("slurm", "--dry-run", "--", "true")),
    "slurm, wrong": Case(launch("slurm", "--dry-run", "--time", "soon", "--", "true"), 2),
    "slurm-rank": Case(launch("slurm-rank", "--", "true"), 2),
    "elastic-rank": Case(launch("elastic-rank", "--", "true"), 2),
    "slurm-job": Case(launch("slurm-job", "--", "true"), 2),
    "slurm-job in a job": Case(
        launch("slurm-job", "--", "bash", "-c", "echo 0: hm; exit 3"), 3, env={"SLURM_JOB_ID": "7"}
    ),
    "install.py --help": Case([PYTHON, "launch/install.py", "--help"]),
}


@pytest.fixture
def environment(tmp_path: Path) -> Dict[str, str]:
    """What ``env -i HOME=... PATH=...`` gives, and one thread."""
    (tmp_path / "home").mkdir()
    given = {"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    return given


@contextlib.contextmanager
def opened(streams: str) -> Iterator[Dict[str, int]]:
    """Arguments for Popen: the standard streams as ``streams`` says."""
    ends: List[int] = []
    if streams == "a reader that has gone":
        read, stdin = os.pipe()
        left, write = os.pipe()
        ends = [read, write]
        os.close(stdin)
        os.close(left)
        given = {"stdin": read, "stdout": write, "stderr": write}
    elif streams == "a terminal that has gone":
        keyboard, terminal = pty.openpty()
        ends = [terminal]
        os.close(keyboard)
        given = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    elif streams == "closed":
        given = {}
    else:
        ends = [os.open("/dev/full", os.O_RDWR)]
        stderr = subprocess.PIPE if streams == "a full stdout" else ends[0]
        given = {"stdin": subprocess.DEVNULL, "stdout": ends[0], "stderr": stderr}
    try:
        yield given
    finally:
        for end in ends:
            os.close(end)


def run(command: Sequence[str], streams: str, env: Dict[str, str]) -> subprocess.CompletedProcess:
    """The command's end."""
    if streams == "closed":
        command = ["bash", "-c", f"exec {shlex.join(command)} <&- >&- 2>&-"]
    with opened(streams) as given:
        return subprocess.run(command, cwd=ROOT, env=env, timeout=120, text=True, **given)


def check(case: Case, streams: str, environment: Dict[str, str]) -> None:
    done = run(case.command, streams, {**environment, **case.env})
    lost = "full" in streams and case.full is not None
    assert done.returncode == (case.full if lost else case.code), done.stderr
    if streams == "a full stdout":
        assert "OSError" not in done.stderr and "Exception ignored" not in done.stderr
        assert not lost or (done.stderr.endswith(LOST) and done.stderr.count("\n") == 1)


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("name", CASES)
def test_light_commands(name: str, streams: str, environment: Dict[str, str]) -> None:
    check(CASES[name], streams, environment)


@pytest.mark.parametrize("streams", STREAMS)
def test_a_set_up_that_stops(streams: str, environment: Dict[str, str], tmp_path: Path) -> None:
    """In a project without .venv, on a machine without compilers."""
    for name in ("__init__.py", "install.py", "core/__init__.py", "core/streams.py"):
        (tmp_path / "launch" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(ROOT / "launch" / name), str(tmp_path / "launch" / name))
    program = str(tmp_path / "launch" / "install.py")
    bare = {**environment, "PATH": "/nowhere"}
    with opened("full" if streams == "closed" else streams) as given:
        done = subprocess.run([PYTHON, program], env=bare, timeout=60, text=True, **given)
    assert done.returncode == 1
    if streams == "a full stdout":
        assert done.stderr.startswith("set-up stopped: no make") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize(("function", "code"), [((print, ("hm",)), 0), ((int, ("hm",)), 1)])
def test_ranks_of_a_function(
    function: tuple, code: int, streams: str, environment: Dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "task.pkl").write_bytes(pickle.dumps((*function, {})))
    command = [PYTHON, "-m", "launch.local.function", str(tmp_path), "1"]
    check(Case(command, code), streams, environment)


def test_ranks_whose_reader_leaves_after_a_line(environment: Dict[str, str]) -> None:
    lines = "for i in {1..200}; do echo $i; sleep 0.005; done"
    command = shlex.join(launch("local", "-n", "2", "--", "bash", "-c", lines))
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that a signal has stopped; it could print nothing."""
    output = tmp_path_factory.mktemp("runs")
    env = {"HOME": str(output), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    settings = [*SMALL, f"output={output}", "name=one", "train.epochs=200", "checkpoint.keep=1"]
    with opened("full") as given:
        process = subprocess.Popen(trainer("train", *settings), cwd=ROOT, env=env, **given)
        try:
            deadline = time.monotonic() + 60
            while not list(output.glob("one/checkpoints/step-*/*")) and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGUSR1)
            code = process.wait(timeout=60)
        finally:
            process.kill()
    assert code == 85
    return output / "one"


HEAVY = {
    "runs": answer("runs", "{folder}"),
    "compare": answer("compare", "{run}", "{run}"),
    "summary": answer("summary", "model.factory=tests.integration.nets:small"),
    "evaluate": answer("evaluate", "{run}", "--trust"),
    "predict": answer("predict", "{run}", "--trust", "tests/sample/t10k-images-idx3-ubyte.gz"),
    "calibrate": Case(["calibrate", "{run}", "--trust", "--samples=4", "--output={new}"]),
    "export": Case(["export", "{run}", "--trust", "--no-onnx", "--output={new}"]),
    "train": Case(["train", *SMALL, "train.max_steps=2", "output={new}"]),
    "train, wrong": Case(["train", "data.folder=nowhere", "data.dataset=idx", "output={new}"], 2),
    "bench": answer("bench", *SMALL, "--steps=2", "--warmup=1"),
    "bench --json": Case(["bench", *SMALL, "--steps=2", "--warmup=1", "--json={new}"]),
}


@pytest.mark.parametrize("name", HEAVY)
def test_commands_that_load_mxnet(
    name: str, trained: Path, environment: Dict[str, str], tmp_path: Path
) -> None:
    """On a full disk alone, as each takes a second or two."""
    case = HEAVY[name]
    places = {"run": str(trained), "folder": str(trained.parent), "new": str(tmp_path / "new")}
    command = [word.format(**places) for word in case.command]
    check(case._replace(command=trainer(*command)), "a full stdout", environment)


def test_training_whose_terminal_has_gone(environment: Dict[str, str], tmp_path: Path) -> None:
    command = trainer("train", *SMALL, "train.max_steps=2", f"output={tmp_path}")
    env = {**environment, "TERM": "xterm"}
    assert run(command, "a terminal that has gone", env).returncode == 0


def test_the_doctor_and_its_probe(environment: Dict[str, str]) -> None:
    """The doctor's exit code is its verdict."""
    probe = [PYTHON, "-m", "launch.doctor.probe", "libraries"]
    check(Case(probe, full=2), "a full stdout", environment)
    done = run(launch("doctor"), "a full stdout", environment)
    assert done.returncode in (0, 1) and done.stderr == f"launch: {LOST}"


def test_the_data_set(environment: Dict[str, str]) -> None:
    command = [PYTHON, "-m", "trainer.data.fashion_mnist"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode
    check(Case(command, found, full=2 - (found != 0)), "a full stdout", environment)

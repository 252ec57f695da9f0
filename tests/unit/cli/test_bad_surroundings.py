"""Strange variables and unexpected errors are reported by the rank that meets them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.core.process import lacks_cause
from tests.bad_input import EndError, one_line
from trainer.batch_norm.rank_sum import registry
from trainer.cli import main as entry
from trainer.console import USER_ERROR
from trainer.dist import environment
from trainer.dist.shared_memory import LostPeerError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"HOROVOD_SIZE": "2"}, "HOROVOD_SIZE=2 in the environment"),
        ({"HOROVOD_RANK": "1"}, "HOROVOD_RANK=1 in the environment"),
        ({"HOROVOD_SIZE": "2", "HOROVOD_RANK": "1"}, "`unset HOROVOD_SIZE HOROVOD_RANK`"),
        ({"HOROVOD_SIZE": "two"}, "HOROVOD_SIZE is 'two'; it must be a whole number"),
        ({"HOROVOD_RANK": ""}, "`unset HOROVOD_RANK`"),
        ({"HOROVOD_SIZE": "-1"}, "HOROVOD_SIZE is '-1'; it must be a whole number from 1"),
        ({"HOROVOD_RANK": "-1"}, "HOROVOD_RANK is '-1'; it must be a whole number from 0"),
    ],
)
def test_variables_that_no_launcher_set_are_reported_whatever_rank_they_name(
    monkeypatch, capsys, variables, words
):
    def leave(code: int) -> None:
        raise EndError(code)

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(entry.console, "leave", leave)
    monkeypatch.setattr("sys.argv", ["trainer", "export", "nowhere", "--output", "nowhere"])
    with pytest.raises(EndError, match=str(entry.USER_ERROR)):
        entry.run()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in one_line(error.rstrip("\n"))


IMPORT_FIT = ["-c", "from trainer import fit"]
PREDICT = ["-m", "trainer", "predict", "nowhere", "picture.png"]


@pytest.mark.parametrize("command", [PREDICT, IMPORT_FIT], ids=["command line", "Python"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OMP_NUM_THREADS", "2,1"),  # ended the process within MXNet
        ("OMP_NUM_THREADS", "many"),
        ("OMP_NUM_THREADS", "0"),
        ("OMP_NUM_THREADS", ""),
        ("MXNET_CPU_WORKER_NTHREADS", "-2"),
        ("HOROVOD_GLOO_TIMEOUT_SECONDS", "5 s"),
    ],
)
def test_counts_that_libraries_cannot_read_are_refused_in_one_line(command, name, value):
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, name: value}, capture_output=True, text=True
    )
    last = done.stderr.splitlines()[-1]
    words = f"{name} is {value!r}; it must be a whole number from 1 to 999999: correct it, or"
    assert done.returncode in (1, 2) and words in last, done.stderr
    if command == PREDICT:
        assert last.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "variables",
    [
        {"HOROVOD_SIZE": "1", "HOROVOD_RANK": "0"},
        {"HOROVOD_SIZE": "2", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1"},
        {"HOROVOD_SIZE": "2", "PMI_SIZE": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    ],
)
def test_what_launchers_set_is_left_alone(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment.check()


@pytest.fixture
def said_of(monkeypatch, capsys):
    """What a rank says, and that it exits with a code, when training raises an error."""
    monkeypatch.setattr(registry, "lost", None)  # other tests have lost some

    def run(error: Exception, rank: int, code: int = 1) -> str:
        def leave(code: int) -> None:
            raise EndError(code)

        def train(**options: object) -> None:
            raise error

        monkeypatch.setenv("HOROVOD_RANK", str(rank))
        monkeypatch.setattr(entry.console, "leave", leave)
        monkeypatch.setattr(entry.train.train, "callback", train)
        monkeypatch.setattr("sys.argv", ["trainer", "train"])
        with pytest.raises(EndError) as end:
            entry.run()
        assert end.value.args == (code,)
        return capsys.readouterr().err

    return run


def test_a_misspelt_command_is_told_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["trainer", "trian"])
    monkeypatch.setattr(entry.console, "leave", lambda code: None)
    entry.run()
    error = capsys.readouterr().err
    assert error.startswith("error: there is no command 'trian'; did you mean train?; one of")


def test_ctrl_c_while_libraries_are_imported_is_no_traceback(tmp_path):
    (tmp_path / "click.py").write_text("import time\nprint('there', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "train"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (-signal.SIGINT, "")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_unexpected_error_is_reported_with_its_traceback_on_any_rank(said_of, rank):
    """Such as a ValueError from NumPy, or from the user's own net, in the middle of a run."""
    error = said_of(ValueError("operands could not be broadcast together"), rank)
    assert "Traceback" in error and "test_bad_surroundings.py" in error
    assert f"rank {rank} on" in error and "operands could not" in error


def test_a_file_that_the_user_may_not_open_is_one_line_on_each_rank_that_meets_it(said_of):
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/other/user/train")
    said = "error: /other/user/train may not be read, or not written, by this user\n"
    assert said_of(error, 1, code=USER_ERROR) == said


@pytest.mark.parametrize("error", [MemoryError(), ValueError("x\nstd::bad_alloc")])
def test_memory_that_runs_out_is_one_line(said_of, error):
    assert said_of(error, 1).endswith(
        ": memory ran out; lower train.global_batch_size, or start fewer ranks\n"
    )


def test_a_limit_of_addresses_in_which_mxnet_crashes_is_refused_in_one_line():
    line = f"ulimit -v 1400000; exec {sys.executable} -m trainer predict nowhere picture.png"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: `ulimit -v` allows 1400000 kB of addresses; MXNet's")


@pytest.mark.parametrize("words", entry._LOST_PEER)
def test_a_rank_that_lost_another_says_so_in_words_that_the_launcher_knows(said_of, words):
    """Or it would be named for the cause: see launch/core/process.py."""
    error = said_of(RuntimeError(f"...: {words}"), 1)
    assert len(error.splitlines()) == 1 and "rank 1 on" in error
    assert lacks_cause(True, error.splitlines()) and lacks_cause(True, [words])


def test_a_rank_that_lost_another_in_shared_memory_says_so_though_an_error_follows(said_of):
    lost = LostPeerError("process 0 of 2 on this node ended before its turn")
    assert len(said_of(lost, 1).splitlines()) == 1
    following = OSError("in a clean-up")
    following.__context__ = lost
    assert len(said_of(following, 1).splitlines()) == 1
    assert lacks_cause(True, [str(lost)])


def test_an_operator_that_has_lost_a_rank_says_so_though_its_error_does_not(said_of, monkeypatch):
    monkeypatch.setattr(registry, "lost", "process 0 of 2 on this node has been stopped")
    error = said_of(RuntimeError("Check failed in custom.cc"), 1)
    assert len(error.splitlines()) == 1 and "rank 1 on" in error
    assert lacks_cause(True, error.splitlines()) and lacks_cause(True, [registry.lost])

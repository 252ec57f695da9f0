"""What a run says to type next, as it was started."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import List, Optional

import pytest

from trainer.config import Config, Data, Monitor
from trainer.report.commands import next_commands, typed

QUICK = "configs/quickstart.yaml"
BETTER = "configs/fashion_mnist.yaml"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that makes this process one of ``ranks``, started by ``words`` and a launcher."""
    bin = tmp_path / ".venv" / "bin"
    bin.mkdir(parents=True)
    for name in ("python", "tensorboard", "gluon-train", "horovodrun"):
        (bin / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(bin / "python"))

    def start(words: List[str], by: Optional[str] = None, ranks: int = 1, activated: bool = False):
        monkeypatch.setattr(sys, "argv", [str(tmp_path / "trainer" / "__main__.py"), *words])
        monkeypatch.setenv("LAUNCH_PATH", str(bin) if activated else "/usr/bin")
        monkeypatch.delenv("LAUNCHED_BY", raising=False)
        if by is not None:
            monkeypatch.setenv("LAUNCHED_BY", by)
        if ranks > 1:
            monkeypatch.setenv("HOROVOD_SIZE", str(ranks))
            monkeypatch.setenv("HOROVOD_LOCAL_SIZE", str(ranks))

    return start


def test_in_a_plain_shell_programs_have_their_path(started) -> None:
    started(["train", QUICK])
    assert next_commands(Config(), "done") == {
        "view": ".venv/bin/tensorboard --logdir runs",
        "list runs": ".venv/bin/python -m trainer runs",
        "higher accuracy": f".venv/bin/python -m trainer train {BETTER}",
    }


def test_where_the_environment_is_activated_they_have_none(started) -> None:
    started(["train", "quickstart", "output=my runs"], activated=True)
    assert next_commands(Config(output="my runs"), "done") == {
        "view": "tensorboard --logdir 'my runs'",
        "list runs": "python -m trainer runs 'my runs'",
        "higher accuracy": "python -m trainer train fashion_mnist 'output=my runs'",
    }
    assert typed("nowhere") == ".venv/bin/nowhere"


@pytest.mark.parametrize(
    ("by", "ranks", "again"),
    [
        ("make", 2, "make train 'ARGS=optimizer.lr=0.2 '\"'\"'a=$$b c'\"'\"''"),
        ("make", 3, "make train RANKS=3 'ARGS=optimizer.lr=0.2 '\"'\"'a=$$b c'\"'\"''"),
        ("local -n 2 --", 2, "python -m launch local -n 2 -- python -m trainer train {words}"),
        (None, 2, "horovodrun -np 2 python -m trainer train {words}"),
        (None, 1, "python -m trainer train {words}"),
    ],
)
def test_a_stopped_run_says_how_to_resume_it(started, by, ranks: int, again: str) -> None:
    started(["train", QUICK, "optimizer.lr=0.2", "a=$b c"], by, ranks, activated=True)
    words = f"{QUICK} optimizer.lr=0.2 'a=$b c'"
    commands = next_commands(Config(), "stopped")
    assert commands["resume"] == again.format(words=words) and len(commands) == 2


def test_a_run_that_stopped_early_says_how_to_go_on(started) -> None:
    started(["train", QUICK], activated=True)
    longer = next_commands(Config(), "stopped early")["continue"]
    assert longer == f"python -m trainer train {QUICK} train.patience=null"


def test_no_better_preset_is_named_where_there_is_none(started) -> None:
    started(["train", QUICK])
    sample = Config(data=Data(dataset="fashion_mnist_sample"))
    assert "higher accuracy" not in next_commands(sample, "done")
    started(["train", BETTER])
    assert "higher accuracy" not in next_commands(Config(), "done")


def test_a_program_of_the_users_own_has_no_command_of_ours(
    started, monkeypatch: pytest.MonkeyPatch
) -> None:
    started([])
    assert next_commands(Config(), "stopped")["resume"] == "the same command"
    monkeypatch.setattr(sys, "argv", ["/home/me/mine/__main__.py", "train", "fast"])
    assert next_commands(Config(), "stopped")["resume"] == "the same command"


def test_programs_that_are_not_beside_python_are_taken_from_the_path(
    started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Colab, and after `pip install --user`."""
    started(["train", QUICK])
    (tmp_path / ".venv" / "bin" / "tensorboard").unlink()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tensorboard").touch(mode=0o755)
    monkeypatch.setenv("LAUNCH_PATH", str(tmp_path / "bin"))
    assert typed("tensorboard") == "tensorboard"


def test_there_is_nothing_to_view_without_event_files(started) -> None:
    started(["train", QUICK])
    csv = Config(monitor=Monitor(loggers=("csv",)))
    assert list(next_commands(csv, "done")) == ["list runs", "higher accuracy"]


@pytest.mark.parametrize(
    "anew", [["--resume", "none"], ["--resume=none"], ["--force", "--resume", "a/step-00000002"]]
)
def test_what_is_said_goes_on_with_the_run_and_not_anew(started, anew: List[str]) -> None:
    started(["train", QUICK, *anew, "name=z"], activated=True)
    again = f"python -m trainer train {QUICK} name=z"
    assert next_commands(Config(), "stopped")["resume"] == again
    assert next_commands(Config(), "stopped early")["continue"] == f"{again} train.patience=null"


@pytest.mark.parametrize("ranks", [1, 4])
def test_in_a_job_of_slurm_no_command_of_another_launcher_is_named(
    started, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.setenv("LAUNCH_ID", "slurm.7")
    started(["train", QUICK], ranks=ranks)
    assert next_commands(Config(), "stopped")["resume"] == "the same command"
    assert "higher accuracy" not in next_commands(Config(), "done")
    started(["train", QUICK, "--resume", "none"], ranks=ranks)
    commands = next_commands(Config(), "stopped early")
    assert commands["continue"] == (
        "the same command without --resume and --force, with train.patience=null"
    )

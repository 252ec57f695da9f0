"""Runs on disks that lack locks or syncing, are slow, or lose the run's folder."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.waiting import wait_until
from trainer import checkpoint
from trainer.report import result

from . import disks
from .commands import SMALL, curves, read_until, run, start, trainer


def saved(output: Path) -> Path:
    """The newest checkpoint of the run there, which must be whole."""
    path = checkpoint.find_latest(output / "default" / "checkpoints", pytest.fail)
    assert path is not None
    return path


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_without_locks_a_run_goes_on_and_says_so_once(tmp_path: Path, name: str) -> None:
    number = getattr(errno, name)
    command = trainer("train", *SMALL, "train.epochs=1", f"output={tmp_path}")
    done = run(disks.command_on(disks.like(tmp_path, flock=number), *command))
    assert done.code == 0, done.err
    (said,) = (line for line in done.err.splitlines() if "without locks" in line)
    assert said.startswith(f"warning: {tmp_path}") and os.strerror(number) in said
    assert checkpoint.step_of(saved(tmp_path)) == 16


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP"])
def test_where_folders_cannot_be_synced_saves_are_kept(tmp_path: Path, name: str) -> None:
    number = getattr(errno, name)
    settings = ["train.epochs=1", "checkpoint.every_steps=4", f"output={tmp_path}"]
    command = trainer("train", *SMALL, *settings)
    done = run(disks.command_on(disks.like(tmp_path, sync_folder=number), *command))
    assert done.code == 0, done.err
    (said,) = (line for line in done.err.splitlines() if "cannot sync" in line)
    assert os.strerror(number) in said and "folders" in said
    assert checkpoint.step_of(saved(tmp_path)) == 16


def test_a_save_slower_than_the_watchdog_is_waited_for_by_all_ranks(tmp_path: Path) -> None:
    """Each save takes 12 s, of which the next one, two steps later, waits for the most."""
    settings = [
        *SMALL,
        "train.watchdog_seconds=5",  # a busy machine may stand still for 2 s
        "train.max_steps=4",
        "checkpoint.every_steps=2",
        f"output={tmp_path}",
    ]
    launch = [sys.executable, "-m", "launch", "local", "-n", "2", "--"]
    command = disks.command_on(disks.like(tmp_path, sync_seconds=12), *launch)
    done = run([*command, *trainer("train", *settings)])
    assert done.code == 0, done.err
    assert checkpoint.step_of(saved(tmp_path)) == 4


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_folder_that_goes_in_mid_run_is_told_and_made_again(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "runs" / "default"
    settings = [*SMALL, "train.epochs=500", "checkpoint.every_steps=4", f"output={folder.parent}"]
    process = start(trainer("train", *settings))
    try:
        wait_until(lambda: checkpoint.listing(folder / "checkpoints"), lambda: "no checkpoint")
        folder.rename(tmp_path / "elsewhere")
        if how == "removed":
            shutil.rmtree(tmp_path / "elsewhere")
        said = read_until(process, "removed or renamed in mid-run")
        read_until(process, "test loss")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 85
    assert said.count("mid-run") == 1 and str(folder) in said.splitlines()[-1]
    step = checkpoint.step_of(saved(folder.parent))
    points = [point for point, _ in curves(folder)["loss/train"]]
    assert points == list(range(4, step + 1, 4))
    assert result.read(folder).step == step
    again = run(trainer("train", *settings, f"train.max_steps={step + 2}"))
    assert again.code == 0 and "resumes from" in again.out, again.err

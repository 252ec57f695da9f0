"""Checkpoints: resumed on other numbers of ranks, and kept when the disk is full."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Iterator

import mxnet as mx
import numpy as np
import pytest

from tests.waiting import wait_until
from trainer import checkpoint

from .commands import ROOT, SMALL, curves, environment, read_until, run, start, trainer


def test_a_run_resumed_on_1_2_4_and_3_ranks_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """Losses and weights agree to float32 rounding. The straight run's own log finds no room."""
    settings = [
        *SMALL,
        "model.factory=tests.integration.nets:smooth",
        "train.epochs=1",
        "monitor.every_steps=2",
        f"output={tmp_path}",
    ]
    with open("/dev/full", "w") as full:
        command = trainer("train", *settings, "name=straight")
        done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=full, timeout=240)
    assert done.returncode == 0
    for ranks, last_step in ((1, 5), (2, 8), (4, 13), (3, 16)):
        stage = run(trainer("train", *settings, f"train.max_steps={last_step}", ranks=ranks))
        assert stage.code == 0, stage.out + stage.err
        assert ("resumes from" in stage.out) == (ranks > 1)
    ours, expected = curves(tmp_path / "default"), curves(tmp_path / "straight")
    assert [step for step, _ in expected["loss/train"]] == list(range(2, 17, 2))
    assert expected.keys() == ours.keys()
    for tag, points in expected.items():
        # Where a stage ends it shows its epoch and the test set so far, besides.
        found = dict(ours[tag])
        np.testing.assert_allclose(
            [found[step] for step, _ in points], [value for _, value in points], rtol=2e-4
        )
    paths = [tmp_path / name / "checkpoints" / "step-00000016" for name in ("default", "straight")]
    ours, expected = (mx.nd.load(str(path / checkpoint.PARAMETERS)) for path in paths)
    for name, array in expected.items():
        np.testing.assert_allclose(ours[name].asnumpy(), array.asnumpy(), rtol=0, atol=1e-5)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of its own, of 400 KB."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room that is left, however much it has taken already."""
    filling = disk / "filling"
    with open(filling, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))
    return filling


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_ends_no_run_and_costs_no_point_and_no_checkpoint(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        settings = [*SMALL, "train.epochs=1000", "checkpoint.every_steps=4", f"output={disk}"]
        process = start(trainer("train", *settings))
        try:
            read_until(process, "images/s")
            # It is written while training goes on.
            checkpoints = disk / "default" / "checkpoints"
            wait_until(lambda: checkpoint.listing(checkpoints), lambda: "there is no checkpoint")
            filling = fill(disk)
            read_until(process, "points wait for room")
            said = read_until(process, "could not be written")
            assert "No space left on device" in said or "is the disk full?" in said
            assert checkpoint.find_latest(checkpoints, pytest.fail)
            filling.unlink()
            read_until(process, "test loss")
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 85
        path = checkpoint.find_latest(checkpoints, pytest.fail)
        assert path is not None
        step = checkpoint.read_state(path).step
        points = [point for point, _ in curves(disk / "default")["loss/train"]]
        assert points == list(range(4, step + 1, 4))

        # Stopped while nothing can be saved, it must not say that it saved.
        process = start(trainer("train", *settings))
        try:
            read_until(process, "images/s")
            fill(disk)
            read_until(process, "could not be written")
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 2
        last = out.splitlines()[-1]
        assert last.startswith("error: the run made") and "the last good checkpoint is" in last

        # Without room from the start nothing is begun, and nothing is written over.
        # (What the last run could not write it has taken away, so there is room again.)
        fill(disk)
        before = (disk / "default" / "config.yaml").read_text()
        done = run(trainer("train", *settings, "checkpoint.keep=3"))
        assert done.code == 2 and "No space left on device" in done.err
        assert len(done.err.splitlines()) == 1
        assert (disk / "default" / "config.yaml").read_text() == before
        assert checkpoint.find_latest(checkpoints, pytest.fail)

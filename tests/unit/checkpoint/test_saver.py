"""Saving in the background: a checkpoint holds the state of the step at which it began."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn

from trainer import checkpoint
from trainer.checkpoint import saver as saver_module
from trainer.checkpoint.saver import Saver
from trainer.config import Config, Optimizer
from trainer.data.loader import Batch
from trainer.step.optimizer import make_trainer
from trainer.step.step import train_step


class Run:
    """A convolution large enough for oneDNN to lay its weights out anew, and its momenta."""

    def __init__(self) -> None:
        mx.random.seed(0)
        self.net = nn.HybridSequential()
        self.net.add(
            nn.Conv2D(64, 3, in_channels=16),
            nn.BatchNorm(in_channels=64),
            nn.Conv2D(64, 3, in_channels=64),
            nn.Flatten(),
            nn.Dense(3, in_units=64 * 16),
        )
        self.net.initialize(mx.init.Xavier())
        self.net.hybridize(static_alloc=True)
        self.trainer = make_trainer(self.net, Optimizer("sgd", lr=0.01))

    def step(self, number: int) -> None:
        random = np.random.RandomState(number)
        data = mx.nd.array(random.normal(size=(4, 16, 8, 8)))
        batch = Batch(data, mx.nd.array(random.randint(0, 3, 4)), 4, 4)
        train_step(self.net, self.trainer, batch, Config())
        self.net(data)  # in inference, where weights are laid out anew

    def snapshot(self, step: int) -> checkpoint.Snapshot:
        return checkpoint.snapshot(self.net, self.trainer, checkpoint.RunState(step=step))


def assert_same(arrays: dict, others: dict) -> None:
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert array.asnumpy().tobytes() == others[name].asnumpy().tobytes(), name


def load(path: Path, name: str) -> dict:
    return mx.nd.load(str(path / name))


@pytest.fixture
def held(monkeypatch):
    """Saves stop at their first sync to disk (and say so) until they are released."""
    reached, release = threading.Event(), threading.Event()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        reached.set()
        assert release.wait(60)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    yield SimpleNamespace(wait=lambda: reached.wait(60), release=release.set)
    release.set()


def test_each_checkpoint_is_of_its_step_and_training_of_no_save(tmp_path):
    quiet, saved = Run(), Run()
    told = []
    saver = Saver(tmp_path, 99, pytest.fail, told.append)
    expected = {}
    for step in range(12):
        quiet.step(step)
        saved.step(step)
        saver.wait()
        expected[step] = quiet.snapshot(step)
        saver.begin(saved.snapshot(step))
    assert saver.wait() is None
    paths = checkpoint.listing(tmp_path)
    assert [checkpoint.step_of(path) for path in paths] == list(range(12)) and told == paths
    for step, path in enumerate(paths):
        assert checkpoint.problem(path) is None
        assert_same(load(path, checkpoint.PARAMETERS), expected[step].parameters)
        assert_same(load(path, checkpoint.OPTIMIZER), expected[step].optimizer)


def test_training_goes_on_while_a_save_is_under_way(tmp_path, held):
    run = Run()
    run.step(0)
    saver = Saver(tmp_path, 1, pytest.fail)
    before = run.snapshot(1)
    saver.begin(before)
    assert held.wait()
    for step in range(1, 4):
        run.step(step)
        saver.poll()
    mx.nd.waitall()
    assert checkpoint.listing(tmp_path) == []
    held.release()
    assert saver.wait() is None
    (path,) = checkpoint.listing(tmp_path)
    assert_same(load(path, checkpoint.PARAMETERS), before.parameters)


def test_a_failed_save_is_reported_once_and_the_next_one_counts(tmp_path, held):
    told = []
    folder = tmp_path / "checkpoints"
    folder.write_text("a file in the place of the folder")
    content = Run().snapshot(1)
    saver = Saver(folder, 1, told.append)
    saver.begin(content)
    failure = saver.wait()
    assert failure and "Not a directory" in failure and "\n" not in failure
    assert saver.wait() == failure
    assert told == [f"{failure}; the older ones are as they were"]
    folder.unlink()
    saver.begin(content)
    held.release()
    assert saver.wait() is None
    assert len(told) == 1 and len(checkpoint.listing(folder)) == 1


def test_polling_does_not_wait_and_reports_a_failure(tmp_path, held):
    told = []
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, 1, told.append)
    saver.begin(Run().snapshot(1))
    assert held.wait()
    saver.poll()
    folder.rename(tmp_path / "moved away")
    held.release()
    saver._thread.shutdown()
    assert told == []
    saver.poll()
    assert len(told) == 1 and "step-00000001 could not be written" in told[0]


@pytest.mark.parametrize("hangs", [False, True])
def test_a_slow_save_is_progress_and_one_that_hangs_is_none(tmp_path, held, monkeypatch, hangs):
    beats = []
    if hangs:
        monkeypatch.setattr(saver_module, "HANGS_AFTER", 0.0)
    saver = Saver(tmp_path, 1, pytest.fail, beat=lambda: beats.append(None))
    assert saver.ends_soon() and not beats
    saver.begin(Run().snapshot(1))
    assert held.wait() and not saver.ends_soon()
    assert len(beats) == (0 if hangs else 1)
    held.release()
    assert saver.wait() is None and saver.ends_soon()


def test_an_unexpected_error_is_raised_unchanged(tmp_path):
    saver = Saver(tmp_path, 1, pytest.fail)
    saver.begin(Run().snapshot(1)._replace(state=checkpoint.RunState(step=1, accuracy=object())))
    with pytest.raises(TypeError):
        saver.wait()

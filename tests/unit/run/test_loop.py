"""What a run does with its settings, step by step: small runs of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, List

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn

from trainer import checkpoint
from trainer.config import Config, from_dict
from trainer.data import input_pipeline
from trainer.dist.watchdog import Watchdog
from trainer.run import loop
from trainer.step.schedule import lr_schedule

DRAW = np.random.RandomState(0)
SET = DRAW.randint(0, 256, (12, 3, 3)).astype(np.uint8), np.arange(12) % 2
STEPS = 6


def made(*layers: Any) -> nn.HybridSequential:
    net = nn.HybridSequential()
    net.add(*layers, nn.Dense(2))
    return net


def config(folder: Path, **others: Any) -> Config:
    """Of six steps in two epochs."""
    train = {"epochs": 2, "global_batch_size": 4}
    return from_dict({"output": str(folder), "train": train, "monitor": {"loggers": []}, **others})


def test_each_step_is_made_at_its_own_learning_rate(tmp_path: Path) -> None:
    """A loss of gradient 1 moves the bias by the learning rate."""
    settings = config(
        tmp_path,
        optimizer={"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0},
        schedule={"name": "cosine", "warmup_epochs": 1},
    )
    net, told, biases = made(), [], [0.0]

    def look(end: loop.StepEnd) -> None:
        told.append(end.lr)
        biases.append(float(net[0].bias.data()[0].asscalar()))

    total: Callable[..., Any] = lambda scores, label: scores.sum(axis=1)  # noqa: E731
    loop.fit(net, settings, loss=total, train=SET, on_step=look)
    expected = [0.5 * lr_schedule(settings.schedule, step, 3, 2) for step in range(STEPS)]
    assert len(set(expected)) > 4
    assert told == pytest.approx(expected)
    assert -np.diff(biases) == pytest.approx(expected, abs=1e-5)


def losses(folder: Path, seed: int) -> List[float]:
    """Of each step, where nothing but dropout can depend on the seed."""
    net, found = made(nn.Dropout(0.5)), []
    net.initialize(mx.init.One())
    ones = np.full((12, 3, 3), 255, np.uint8), np.arange(12) % 2
    settings = config(folder, seed=seed, optimizer={"lr": 1e-9}, data={"pad_crop": 0})

    def last_layer(scores: Any, label: Any) -> Any:
        return scores.sum(axis=1)

    def look(end: loop.StepEnd) -> None:
        found.append(float(end.result.loss_sum.asscalar()))

    loop.fit(net, settings, loss=last_layer, train=ones, on_step=look)
    return found


def test_dropout_goes_by_the_seed(tmp_path: Path) -> None:
    first = losses(tmp_path / "1", 1)
    assert len(set(first)) > 2
    assert losses(tmp_path / "2", 1) == first != losses(tmp_path / "3", 2)


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_are_kept_as_asked_for(tmp_path: Path, keep: int) -> None:
    settings = config(tmp_path, checkpoint={"keep": keep, "every_steps": 1})
    loop.fit(made(), settings, train=SET)
    kept = checkpoint.listing(settings.checkpoint_folder)
    assert [path.name for path in kept] == [f"step-{step:08d}" for step in range(1, 7)][-keep:]


def test_the_watchdog_has_the_runs_seconds_and_hears_of_each_batch_of_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, given = [], []

    class Listening(Watchdog):
        def __init__(self, seconds: float, who: str):
            super().__init__(seconds, who)
            given.append(seconds)

        def beat(self, doing: str) -> None:
            super().beat(doing)
            heard.append(doing)

    monkeypatch.setattr(loop, "Watchdog", Listening)
    settings = config(
        tmp_path,
        train={"epochs": 1, "global_batch_size": 4, "watchdog_seconds": 123.0},
        evaluate={"batch_size": 5},
        calibrate_samples=8,
    )
    loop.fit(made(nn.BatchNorm()), settings, train=SET, test=SET)
    assert given == [123.0]
    # Two batches to calibrate on, and three to evaluate.
    passes = [doing for doing in heard if doing.startswith("batch ")]
    assert passes == [f"batch {n} of a pass after step 3" for n in (0, 1, 0, 1, 2)]
    assert [doing for doing in heard if doing.startswith("step ")] == ["step 0", "step 1", "step 2"]


def test_calibration_takes_the_batches_that_training_would_see_next(tmp_path: Path) -> None:
    settings = config(tmp_path, calibrate_samples=4, optimizer={"lr": 1e-9})
    net = made(nn.BatchNorm())
    loop.fit(net, settings, train=SET, test=SET)
    sets = input_pipeline.read(settings.data, SET, None)
    loader = input_pipeline.train_loader(sets.train, settings, mx.cpu())
    means = [float(batch.data.mean().asscalar()) for batch in loader.from_step(0, STEPS + 1)]
    assert min(abs(mean - means[-1]) for mean in means[:-1]) > 1e-3
    assert net[0].running_mean.data().asscalar() == pytest.approx(means[-1], rel=1e-4)


def test_a_validation_set_of_its_own_chooses_and_the_test_set_is_looked_at_once(
    tmp_path: Path,
) -> None:
    """The net is driven to say 0 of all images: right on one set, wrong on the other."""
    images, told = SET[0], []
    zeros, ones = (np.full(len(images), label) for label in (0, 1))
    train = {"epochs": 9, "global_batch_size": 4, "patience": 1}
    settings = config(tmp_path, train=train, optimizer={"lr": 1.0})

    def total(scores: Any, label: Any) -> Any:  # raises the score of class 0 alone
        return scores[:, 1] - scores[:, 0]

    result = loop.fit(
        made(),
        settings,
        loss=total,
        train=SET,
        validation=(images, zeros),
        test=(images[:5], ones[:5]),
        on_evaluation=lambda end: told.append((end.set, end.step, end.evaluation.samples)),
    )
    assert result.stopped_early and result.evaluation.accuracy == 1 and result.test.accuracy == 0
    *chosen, last = told
    assert {name for name, *_ in chosen} == {"validation"} and last == ("test", result.steps, 5)
    best = checkpoint.find_best(settings.checkpoint_folder)
    assert best is not None and checkpoint.read_state(best).accuracy == 1

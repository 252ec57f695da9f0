"""What a run does with its settings, step by step: small runs of one process."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any, Callable, List, Tuple

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn

from trainer import checkpoint
from trainer.config import Config, from_dict
from trainer.data import input_pipeline
from trainer.dist.watchdog import Watchdog
from trainer.report import loggers
from trainer.run import loop, outcome
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


Told = List[Tuple[str, Any]]


def stoppable(folder: Path, told: Told, stop_at: int = 0, **others: Any) -> Any:
    """A run that evaluates in batches of two; the ``stop_at``-th batch comes with a SIGTERM."""
    batches = 0
    steps: List[int] = []  # before the first, metrics are tried

    def looked(scores: Any, label: Any) -> Any:
        nonlocal batches
        batches += bool(steps)
        if steps and batches == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return label

    settings = config(
        folder, evaluate={"batch_size": 2}, monitor={"loggers": ["csv"], "every_steps": 2}, **others
    )
    mx.random.seed(0)
    net = made(nn.Dropout(0.5), nn.BatchNorm(in_channels=1))
    net.initialize()
    result = loop.fit(
        net,
        settings,
        train=SET,
        test=(SET[0][:7], SET[1][:7]),
        metrics={"looked": looked},
        on_step=lambda end: steps.append(end.step),
        on_evaluation=lambda end: told.append(("evaluation", end.step)),
        on_epoch_end=lambda end: told.append(("epoch", (end.epoch, *end.training))),
    )
    return result, batches, [p.data().asnumpy() for p in net.collect_params().values()]


def points(folder: Path) -> List[Tuple[str, ...]]:
    with open(folder / "default" / "metrics.csv", newline="") as file:
        rows = [(r["step"], r["tag"], r["value"]) for r in csv.DictReader(file)]
    return sorted(row for row in rows if not row[1].startswith(("speed/", "system/")))


PATIENT = {"epochs": 3, "global_batch_size": 4, "patience": 1}


@pytest.mark.parametrize(
    ("stop_at", "others"),
    [
        (2, {}),  # in the first epoch's evaluation
        (6, {"calibrate_samples": 4}),  # in the last
        (6, {"train": {"epochs": 9, "global_batch_size": 4, "max_steps": 5}}),  # within an epoch
        (6, {"train": PATIENT, "optimizer": {"lr": 1e-9}}),  # by which it stops early
        (10, {"train": PATIENT, "optimizer": {"lr": 1e-9}, "calibrate_samples": 4}),  # and again
    ],
)
def test_a_stop_in_an_evaluation_is_made_at_once_and_the_evaluation_when_it_resumes(
    tmp_path: Path, stop_at: int, others: Any
) -> None:
    told: Told = []
    result, _, expected = stoppable(tmp_path / "a", told, **others)
    told_again: Told = []
    stopped, batches, _ = stoppable(tmp_path / "b", told_again, stop_at, **others)
    assert stopped.stopped and not stopped.stopped_early and batches == stop_at
    assert checkpoint.find_latest(tmp_path / "b" / "default" / "checkpoints", pytest.fail)
    resumed, _, weights = stoppable(tmp_path / "b", told_again, **others)
    assert resumed._replace(folder=result.folder, images_per_second=None, evaluation=None) == (
        result._replace(images_per_second=None, evaluation=None)
    )
    assert resumed.evaluation.loss == result.evaluation.loss
    assert told_again == told
    for ours, theirs in zip(weights, expected):
        np.testing.assert_array_equal(ours, theirs)
    assert points(tmp_path / "b") == points(tmp_path / "a")
    states = [
        checkpoint.read_state(checkpoint.listing(tmp_path / name / "default" / "checkpoints")[-1])
        for name in ("a", "b")
    ]
    assert states[0].plateau == states[1].plateau and states[0].totals == states[1].totals
    assert states[0].accuracy == states[1].accuracy is not None


def test_a_stop_in_the_one_look_at_the_test_set_costs_no_point(tmp_path: Path) -> None:
    others = {"data": {"validation": 0.5}}  # two evaluations of three batches
    result, *_ = stoppable(tmp_path / "a", [], **others)
    stopped, *_ = stoppable(tmp_path / "b", [], 8, **others)
    assert stopped.stopped
    resumed, *_ = stoppable(tmp_path / "b", [], **others)
    assert resumed.test.loss == result.test.loss
    assert points(tmp_path / "b") == points(tmp_path / "a")
    before = points(tmp_path / "b")
    stoppable(tmp_path / "b", [], **others)  # which has nothing left to tell
    assert points(tmp_path / "b") == before


@pytest.mark.parametrize(
    ("number", "raised"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", SystemExit)]
)
def test_a_stop_after_the_last_evaluation_ends_the_script_that_would_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str, raised: Any
) -> None:
    monkeypatch.setenv("LAUNCH_ID", "one")
    monkeypatch.setattr(loop.dist, "shutdown", lambda: None)

    def stop(end: loop.EpochEnd) -> None:
        if end.step == STEPS:
            os.kill(os.getpid(), getattr(signal, number))

    with pytest.raises(raised):
        loop.fit(made(), config(tmp_path), train=SET, test=SET, on_epoch_end=stop)
    assert result_of(tmp_path)["state"] == "done"


def result_of(folder: Path) -> Any:
    return json.loads((folder / "default" / "result.json").read_text())


@pytest.mark.parametrize("fails", [False, True])
def test_loggers_hear_how_a_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    heard: List[Any] = []

    class Logger:
        def __init__(self, *_: Any) -> None:
            pass

        def hyper_parameters(self, *_: Any) -> None:
            heard.append("settings")

        def close(self, failed: bool) -> None:
            heard.append(failed)

    monkeypatch.setitem(loggers._KINDS, "csv", Logger)
    settings = config(
        tmp_path, monitor={"loggers": ["csv"]}, optimizer={"lr": 1e30 if fails else 0.1}
    )
    try:
        loop.fit(made(nn.Dense(3)), settings, train=SET)
    except outcome.TrainingError:
        assert fails
    assert heard == ([True] if fails else ["settings", False]), "though there is no test set"

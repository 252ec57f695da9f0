"""Settings whose effect shows only in a whole run, on one process with a few small images."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import launch
from launch.local.function import RankError
from trainer.checkpoint import CheckpointError
from trainer.config import Data, from_dict
from trainer.errors import ConfigError
from trainer.run.loop import fit

from .test_any_net import SET, trained

QUIET = {"loggers": [], "log_format": "json"}


def _told(capsys: Any, event: str) -> List[Dict[str, Any]]:
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [one for one in told if one["event"] == event]


@pytest.mark.parametrize(
    ("every", "evaluated", "histograms"), [(2, [6, 12, 15], [6, 12, 15]), (0, [15], [])]
)
def test_the_test_set_and_histograms_come_as_often_as_asked(
    tmp_path: Path, capsys: Any, every: int, evaluated: List[int], histograms: List[int]
) -> None:
    """Five epochs of three steps."""
    train = {"epochs": 5, "global_batch_size": 4}
    monitor = {"log_format": "json", "histograms_every_epochs": every}
    trained(nn.Dense(4), tmp_path, train=train, evaluate={"every_epochs": every}, monitor=monitor)
    assert [told["step"] for told in _told(capsys, "evaluation")] == evaluated
    events = EventAccumulator(str(tmp_path / "default" / "events"), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()["histograms"]
    assert len(tags) == (4 if histograms else 0)
    for tag in tags:
        assert [event.step for event in events.Histograms(tag)] == histograms


def test_calibration_measures_the_training_set_at_the_end(tmp_path: Path) -> None:
    """Batch norm of the images themselves then has their own mean and variance."""
    net = nn.HybridSequential()
    net.add(nn.BatchNorm(), nn.Dense(4))
    trained(net, tmp_path, calibrate_samples=12, monitor=QUIET)
    data = (SET[0] / 255 - Data().mean) / Data().std
    running_mean, running_var = net[0].running_mean.data(), net[0].running_var.data()
    assert running_mean.asscalar() == pytest.approx(data.mean(), rel=1e-5)
    assert running_var.asscalar() == pytest.approx(data.var(), rel=1e-5)


def test_an_evaluation_whose_loss_is_not_finite_is_told_of(tmp_path: Path, capsys: Any) -> None:
    whole = gluon.loss.SoftmaxCrossEntropyLoss()

    def loss(scores: Any, labels: Any) -> Any:
        return whole(scores, labels) * (1 if autograd.is_recording() else np.inf)

    trained(nn.Dense(4), tmp_path, loss, monitor=QUIET)
    printed = capsys.readouterr()
    told = [json.loads(line) for line in printed.out.splitlines()]
    (warned,) = [one["message"] for one in told if one["event"] == "warning"]
    assert warned.startswith("the test loss is not finite: ")
    assert json.loads((tmp_path / "default" / "result.json").read_text())["loss"] is None


def test_smoothing_is_not_added_to_a_custom_loss(tmp_path: Path) -> None:
    loss, smoothed = gluon.loss.SoftmaxCrossEntropyLoss(), {"label_smoothing": 0.1}
    with pytest.raises(ConfigError, match=r"train\.label_smoothing is for the default loss"):
        trained(nn.Dense(4), tmp_path, loss, train=smoothed)


def test_a_forced_run_resumes_with_other_settings(tmp_path: Path, capsys: Any) -> None:
    trained(nn.Dense(4), tmp_path, monitor=QUIET, train={"epochs": 2, "global_batch_size": 4})
    train = {"epochs": 3, "global_batch_size": 4}
    other = from_dict({"output": str(tmp_path), "train": train, "monitor": QUIET})
    with pytest.raises(CheckpointError, match=r"train\.epochs: 2 -> 3.*--force"):
        fit(nn.Dense(4), other, train=SET, test=SET)
    capsys.readouterr()
    fit(nn.Dense(4), other, force=True, train=SET, test=SET)
    (begin,) = _told(capsys, "begin")
    assert (begin["first_step"], begin["last_step"]) == (6, 9)
    assert "epochs: 3" in (tmp_path / "default" / "config.yaml").read_text()


def test_a_run_is_not_resumed_on_another_number_of_images_unless_forced(tmp_path: Path) -> None:
    """Epochs would end at other steps, in the middle of another permutation."""
    short = {"epochs": 2, "global_batch_size": 4, "max_steps": 4}
    trained(nn.Dense(4), tmp_path, monitor=QUIET, train=short)
    whole = from_dict({"output": str(tmp_path), "train": {**short, "max_steps": None}})
    more = np.concatenate([SET[0], SET[0]]), np.concatenate([SET[1], SET[1]])
    with pytest.raises(CheckpointError, match=r"\(training images: 12 -> 24\).*--force"):
        fit(nn.Dense(4), whole, train=more, test=SET)
    with pytest.raises(CheckpointError, match=r"\(other test images; other test labels\)"):
        fit(nn.Dense(4), whole, train=SET, test=more)
    assert fit(nn.Dense(4), whole, train=SET, test=SET).steps == 6
    assert fit(nn.Dense(4), whole, force=True, train=more, test=SET).steps == 12


@pytest.mark.parametrize("given", [{"name": "mine"}, "configs/quickstart.yaml"])
def test_a_config_of_another_type_is_refused_with_the_way_to_make_one(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"config is a \w+; .* trainer\.config\.(from_dict|load)"):
        fit(nn.Dense(4), given, train=SET, test=SET)


def test_ranks_with_settings_of_their_own_are_refused(tmp_path: Path) -> None:
    """A learning rate for each rank would have their weights part, without a sign of it."""

    def by_rank(**settings: Any) -> int:
        config = {"output": str(tmp_path), "train": {"epochs": 1, "global_batch_size": 4}}
        return fit(nn.Dense(4), from_dict({**config, **settings}), train=SET, test=SET).steps

    def each_its_own(harmless: bool) -> int:
        rank = int(os.environ["HOROVOD_RANK"])
        if harmless:
            return by_rank(name=f"run{rank}", data={"prefetch": 1 + rank, "folder": f"disk{rank}"})
        return by_rank(seed=rank, optimizer={"lr": 0.1 + rank})

    with pytest.raises(RankError) as raised:
        launch.run(each_its_own, (False,))
    said = str(raised.value)
    assert (
        "the ranks have different settings: seed is 0 on rank 0 " in said
        and ", 1 on rank 1 " in said
    )
    assert "optimizer.lr is 0.1 on rank 0 " in said and not list(tmp_path.iterdir())
    assert launch.run(each_its_own, (True,)) == [3, 3]

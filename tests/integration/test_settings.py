"""Settings whose effect shows only in a whole run, on one process with a few small images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List

import pytest
from mxnet import gluon
from mxnet.gluon import nn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError, Data, from_dict
from trainer.loop import fit

from .test_any_net import SET, trained

QUIET = {"tensorboard": False, "log_format": "json"}


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

"""The CSV file of a run on two ranks has each point once, also after a resume."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
from mxnet.gluon import nn

import launch
from trainer.config import from_dict
from trainer.errors import ConfigError
from trainer.run.loop import fit

DRAW = np.random.RandomState(0)
SET = DRAW.randint(0, 256, (60, 6, 6)).astype(np.uint8), DRAW.randint(0, 4, 60)


def run(folder: str, max_steps: Any) -> Any:
    from mxnet.gluon import nn

    from trainer.config import from_dict
    from trainer.run.loop import fit

    seen: Dict[int, float] = {}
    settings = {
        "output": folder,
        "train": {"epochs": 3, "global_batch_size": 20, "max_steps": max_steps},
        "monitor": {"loggers": ["csv"], "every_steps": 2},
    }
    fit(
        nn.Dense(4),
        from_dict(settings),
        train=SET,
        test=SET,
        on_evaluation=lambda end: seen.update({end.step: end.evaluation.loss}),
    )
    return seen


def test_each_point_is_there_once_on_two_ranks(tmp_path: Path) -> None:
    first, _ = launch.run(run, (str(tmp_path), 7), ranks=2)
    second, _ = launch.run(run, (str(tmp_path), None), ranks=2)
    with open(tmp_path / "default" / "metrics.csv", newline="") as file:
        rows = [(row["tag"], int(row["step"]), float(row["value"])) for row in csv.DictReader(file)]
    told = {(tag, step): value for tag, step, value in rows}
    assert len(told) == len(rows)
    assert [step for tag, step, _ in rows if tag == "loss/train"] == [2, 4, 6, 7, 8, 9]
    losses = {step: value for tag, step, value in rows if tag == "loss/test"}
    assert losses == {**first, **second} and sorted(losses) == [3, 6, 7, 9]
    assert not (tmp_path / "default" / "events").exists()


def test_a_logger_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = from_dict({"output": str(tmp_path / "runs"), "monitor": {"loggers": ["mlflow"]}})
    with pytest.raises(ConfigError, match="monitor.loggers has mlflow, which is not installed"):
        fit(nn.Dense(4), config, train=SET, test=SET)
    assert not (tmp_path / "runs" / "default" / "config.yaml").exists()

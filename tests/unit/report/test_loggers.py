"""A run's scalars in a CSV file, and in Weights & Biases and MLflow.

The latter two are not among what the project requires. A stand-in takes the place of one; where
they are installed, the last tests write with them offline.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.config import Config, Monitor
from trainer.errors import ConfigError
from trainer.report import loggers
from trainer.report.loggers import Loggers


def config(folder: Path, *names: str) -> Config:
    (folder / "run").mkdir(exist_ok=True)
    return Config(output=str(folder), name="run", monitor=Monitor(loggers=names))


def rows(folder: Path) -> List[Dict[str, str]]:
    with open(folder / "run" / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_for_each_point_once(tmp_path: Path) -> None:
    first = Loggers(config(tmp_path, "csv", "tensorboard"), 0, pytest.fail)
    for step in (10, 20, 30):
        first.scalars({"loss/train": 1 / step, "class/T-shirt, top": 0.5, "gone": None}, step)
    with open(tmp_path / "run" / "metrics.csv", "a") as file:
        file.write("4")  # killed within a row
    resumed = Loggers(config(tmp_path, "csv"), 20, pytest.fail)
    resumed.scalars({"loss/train": 0.25}, 30)
    resumed.close()
    found = [(int(r["step"]), r["tag"], float(r["value"])) for r in rows(tmp_path)]
    loss, top = "loss/train", "class/T-shirt, top"
    before = [(10, loss, 1 / 10), (10, top, 0.5), (20, loss, 1 / 20), (20, top, 0.5)]
    assert found == [*before, (30, loss, 0.25)]
    Loggers(config(tmp_path, "csv"), 0, pytest.fail).close()  # anew
    assert rows(tmp_path) == []


def test_the_csv_file_of_a_folder_that_goes_is_there_again(tmp_path: Path) -> None:
    logger = Loggers(config(tmp_path, "csv"), 0, pytest.fail)
    logger.scalars({"loss/train": 1.0}, 10)
    (tmp_path / "run").rename(tmp_path / "moved")
    for step in (20, 30):
        logger.scalars({"損失": 0.5}, step)
    logger.close()
    assert [(r["step"], r["value"]) for r in rows(tmp_path)] == [
        ("10", "1.0"),
        ("20", "0.5"),
        ("30", "0.5"),
    ]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_what_is_not_installed_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"has {name}, which is not installed; `pip install"):
        loggers.check(("tensorboard", "csv", name))
    loggers.check(("tensorboard", "csv"))


class StandIn(types.ModuleType):
    """Records calls under the names that both packages have."""

    def __init__(self) -> None:
        super().__init__("stand-in")
        self.calls: List[Any] = []
        self.info = types.SimpleNamespace(run_id="abc")
        self.run: Any = None  # that the user has begun

    def note(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, *args, kwargs))
            return self

        return call

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.note(name)


def test_wandb_gets_points_and_a_resumed_run_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first_step in (0, 5, 0):
        logger = Loggers(config(tmp_path, "wandb"), first_step, pytest.fail)
        logger.scalars({"loss/train": 0.5, "gone": None}, 10)
        logger.close()
    kinds = [call[0] for call in wandb.calls]
    assert kinds == ["init", "log", "finish"] * 3
    assert wandb.calls[1] == ("log", {"loss/train": 0.5}, {"step": 10})
    ids = [call[-1]["id"] for call in wandb.calls if call[0] == "init"]
    assert ids[0] == ids[1] != ids[2]
    assert wandb.calls[0][-1]["config"]["optimizer.lr"] == 0.1


def test_a_copy_of_a_run_is_another_run_at_wandb_and_a_moved_one_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def begin(name: str, first_step: int) -> str:
        Loggers(replace(config(tmp_path, "wandb"), name=name), first_step, pytest.fail).close()
        return [call for call in wandb.calls if call[0] == "init"][-1][-1]["id"]

    first = begin("run", 0)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copied = begin("copy", 5)
    assert copied != first == begin("run", 5) and begin("copy", 7) == copied
    (tmp_path / "run").rename(tmp_path / "moved")
    assert begin("moved", 9) == first
    assert begin("run", 0) not in (first, copied) and begin("moved", 11) == first
    (tmp_path / "moved" / "loggers.json").write_text('{"wandb": "of 0.5.0"}')
    assert begin("moved", 13) == "of 0.5.0"


def test_a_logger_that_is_named_twice_is_begun_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    Loggers(config(tmp_path, "wandb", "csv", "wandb"), 0, pytest.fail).close()
    assert [call[0] for call in wandb.calls] == ["init", "finish"]


def test_a_logger_that_fails_is_told_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, told = StandIn(), []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    both = Loggers(config(tmp_path, "wandb", "csv"), 0, told.append)
    wandb.__dict__["log"] = lambda *_, **__: 1 / 0
    both.scalars({"a": 1.0}, 1)
    both.scalars({"a": 2.0}, 2)
    both.close()
    assert len(told) == 1 and "logger wandb gets nothing more: " in told[0]
    assert [r["value"] for r in rows(tmp_path)] == ["1.0", "2.0"]
    mlflow = StandIn()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    wandb.__dict__["init"] = lambda *_, **__: 1 / 0
    with pytest.raises(ConfigError, match="has wandb, which cannot be started: ") as raised:
        Loggers(config(tmp_path, "mlflow", "wandb"), 0, told.append)
    assert "loggers.json" not in str(raised.value)
    assert mlflow.calls[-1] == ("end_run", "FAILED", {}), "what had begun is not left active"


def test_tensorboard_is_one_of_them(tmp_path: Path) -> None:
    told: List[str] = []
    both = Loggers(config(tmp_path, "tensorboard", "csv"), 0, told.append)
    both.scalars({"loss/train": 0.5, "gone": None}, 10)
    both.each("hyper_parameters", None, 1)  # cannot be: of none
    both.scalars({"loss/train": 0.25}, 20)
    both.close()
    assert len(told) == 1 and "logger tensorboard gets nothing more: " in told[0]
    assert [r["value"] for r in rows(tmp_path)] == ["0.5", "0.25"]
    events = EventAccumulator(str(tmp_path / "run" / "events"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss/train")] == [(10, 0.5)]
    (tmp_path / "run" / "events").rename(tmp_path / "moved")
    (tmp_path / "run" / "events").write_text("mine")
    with pytest.raises(ConfigError, match="has tensorboard, which cannot be started: .*events"):
        Loggers(config(tmp_path, "tensorboard"), 0, told.append)


def test_nothing_is_opened_where_nothing_is_to_be_written(tmp_path: Path) -> None:
    none = Loggers(config(tmp_path, "tensorboard", "csv"), 0, pytest.fail, writes=False)
    none.scalars({"loss/train": 0.5}, 10)
    none.each("flush")
    none.close()
    assert not list((tmp_path / "run").iterdir())


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="it is pinned for Python 3.10 and later")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = Loggers(config(tmp_path, "wandb"), 0, pytest.fail)
    logger.scalars({"loss/train": 0.5}, 10)
    logger.close()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_mlflow_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="it is pinned for Python 3.10 and later")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database would take more packages
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    plain = config(tmp_path, "mlflow")
    factors = replace(plain.optimizer, lr_mult={"features.*": 0.1})
    for first_step, step in ((0, 10), (10, 20)):
        logger = Loggers(replace(plain, optimizer=factors), first_step, pytest.fail)
        logger.scalars({"loss/train": 0.5}, step)
        logger.close()
    (file,) = (tmp_path / "mlruns").glob("*/*/metrics/loss/train")
    assert [line.split()[2] for line in file.read_text().splitlines()] == ["10", "20"]
    (tmp_path / "run" / "loggers.json").write_text('{"mlflow": "none of them"}')
    with pytest.raises(ConfigError, match="has mlflow, which cannot be started"):
        Loggers(plain, 20, pytest.fail)
    assert mlflow.active_run() is None


def test_a_run_of_the_users_own_at_wandb_gets_the_points_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first_step in (0, 5):
        wandb.run, wandb.id = wandb, f"users{first_step}"
        logger = Loggers(config(tmp_path, "wandb"), first_step, pytest.fail)
        logger.scalars({"loss/train": 0.5}, 10)
        logger.close()
        known = json.loads((tmp_path / "run" / "loggers.json").read_text())
        assert known["wandb"] == f"users{first_step}"
    assert wandb.calls == [("log", {"loss/train": 0.5, "step": 10}, {})] * 2


@pytest.mark.parametrize(("failed", "code"), [(False, 0), (True, 1)])
def test_wandb_is_told_how_a_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: bool, code: int
) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    Loggers(config(tmp_path, "wandb"), 0, pytest.fail).close(failed)
    assert wandb.calls[-1] == ("finish", {"exit_code": code})


@pytest.mark.parametrize("own", [False, True])
def test_mlflow_is_told_how_a_run_ended_and_a_run_of_the_users_own_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="it is pinned for Python 3.10 and later")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    users = mlflow.start_run() if own else None
    for first_step, failed, status in ((0, True, "FAILED"), (10, False, "FINISHED")):
        logger = Loggers(config(tmp_path, "mlflow"), first_step, pytest.fail)
        logger.scalars({"loss/train": 0.5}, 10)
        logger.close(failed)
        known = json.loads((tmp_path / "run" / "loggers.json").read_text())["mlflow"]
        assert mlflow.get_run(known).info.status == status
        logger.close()  # again, as where it has ended
    (tmp_path / "run" / "loggers.json").write_text('{"mlflow": "none of them"}')
    away = "cannot be started: .*; without .*run/loggers.json it begins another run there"
    with pytest.raises(ConfigError, match=f"(?s)has mlflow, which {away}"):
        Loggers(config(tmp_path, "mlflow"), 20, pytest.fail)
    active = mlflow.active_run()
    if users is not None:
        assert active is not None and active.info.run_id == users.info.run_id
        assert mlflow.get_run(known).data.tags["mlflow.parentRunId"] == users.info.run_id
        mlflow.end_run()
    else:
        assert active is None

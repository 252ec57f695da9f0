"""Checkpoints that earlier versions have written are resumed as those versions would have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from trainer.checkpoint import RunState, read_state
from trainer.config import recorded

from .commands import run, trainer

# Written by version 0.1.0: two epochs of 16 steps, saved after step 20, with momentum and dropout.
WRITTEN = Path(__file__).with_name("checkpoint_0.1.0") / "step-00000020"
SETTINGS = [
    "model.factory=tests.integration.nets:small",
    "data.dataset=fashion_mnist_sample",
    "data.pad_crop=2",
    "data.flip=true",
    "train.global_batch_size=125",
    "optimizer.lr=0.05",
    "train.epochs=2",
    "train.patience=5",
    "name=old",
]


def test_a_checkpoint_of_the_first_version_is_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "old" / "checkpoints"
    shutil.copytree(WRITTEN, folder / WRITTEN.name)
    done = run(trainer("train", *SETTINGS, f"output={tmp_path}", "--log-format", "json"))
    assert done.code == 0, done.err
    events = [json.loads(line) for line in done.out.splitlines()]
    assert events[0]["first_step"] == 20 and events[0]["resumed_from"]
    # What that version itself went on to, on one machine; others round differently.
    assert events[-1]["loss"] == pytest.approx(1.22333, abs=2e-3)
    assert events[-1]["accuracy"] == pytest.approx(0.524, abs=0.01)


def test_its_state_is_read_whole() -> None:
    state = read_state(WRITTEN)
    assert (state.step, state.accuracy, state.train_size) == (20, 0.504, 2000)
    assert state.totals[1][2] == 500 and list(state.plateau or ()) == [0.466, 0]
    assert state.optimizer["num_update"] == 20
    written = json.loads((WRITTEN / "state.json").read_text())
    fresh = RunState()
    missing = {name for name, value in vars(state).items() if value == getattr(fresh, name)}
    later = vars(fresh).keys() - written.keys()  # what that version did not know yet
    assert missing == {"launch", *later}, "it was not started by a launcher"
    assert state.config == recorded(written["config"]) != written["config"]


def test_it_is_evaluated_as_it_was_then() -> None:
    done = run(trainer("evaluate", str(WRITTEN), "--trust", "train.global_batch_size=1"))
    assert done.code == 0, done.err
    assert "accuracy 0.5040" in done.out

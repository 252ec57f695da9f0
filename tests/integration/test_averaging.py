"""Averages of checkpoints, and of an image and its mirror image."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from trainer import checkpoint, config
from trainer.cli.main import main
from trainer.inference import averaging, model_card, trained_model
from trainer.run.loop import fit

SMALL = [
    "data.dataset=fashion_mnist_sample",
    "data.image_size=8",
    "checkpoint.keep=3",
    "evaluate.every_epochs=3",
    "train.epochs=3",
    "train.global_batch_size=1000",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that keeps three checkpoints."""
    output = tmp_path_factory.mktemp("runs")
    settings = [*SMALL, "monitor.loggers=[]", f"output={output}"]
    return fit(config=config.from_dict({}, settings)).folder


def arrays(path: Path) -> Any:
    return {name: array.asnumpy() for name, array in mx.nd.load(str(path)).items()}


def ask(*arguments: str) -> Result:
    return CliRunner(mix_stderr=False).invoke(main, [*arguments], catch_exceptions=False)


def test_the_mean_of_checkpoints_is_written(folder: Path) -> None:
    paths = checkpoint.listing(folder / "checkpoints")
    assert len(paths) == 3
    asked = ask("average", str(folder))
    file = folder / "averaged.params"
    saved = [arrays(path / "model.params") for path in paths]
    for name, mean in arrays(file).items():
        expected = np.mean([one[name] for one in saved], axis=0, dtype=np.float64)
        np.testing.assert_allclose(mean, expected, rtol=1e-6, atol=1e-9, err_msg=name)
    model = trained_model.load(str(folder), params=str(file))
    accuracy = trained_model.evaluate_saved(model).accuracy
    told = f"wrote {file}, the mean of 3 checkpoints, test accuracy {accuracy:.4f}\n"
    assert asked.stdout == told
    two = folder / "two.params"
    ask("average", str(paths[0]), str(paths[2]), "--output", str(two))
    for name, mean in arrays(two).items():
        expected = (saved[0][name] + saved[2][name].astype(np.float64)) / 2
        np.testing.assert_allclose(mean, expected, rtol=1e-6, atol=1e-9, err_msg=name)
    asked = ask("calibrate", str(folder), "--params", str(file))
    assert asked.stdout.startswith(f"test accuracy {accuracy:.4f} -> ")
    assert ask("evaluate", str(folder), "--params", str(folder / "calibrated.params")).stdout


def test_one_checkpoint_has_no_mean(folder: Path) -> None:
    one = checkpoint.listing(folder / "checkpoints")[0]
    with pytest.raises(checkpoint.CheckpointError, match="is one checkpoint; name two or more"):
        averaging.checkpoints([str(one)])


@pytest.mark.parametrize(
    ("part", "what"), [({"class_names": ["shirt"] * 10}, "classes"), ({"config": {}}, "net")]
)
def test_a_mean_is_of_one_net_and_of_the_same_classes(
    folder: Path, part: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of the same shapes may come from folds whose classes are in another order."""
    saved = trained_model.load(str(folder))
    one, other = (path for path in checkpoint.listing(folder / "checkpoints") if path != saved.path)
    state = checkpoint.read_state(other)
    if what == "net":
        part = {"config": {**state.config, "model": {**state.config["model"], "factory": "a:b"}}}
    read = checkpoint.read_state
    monkeypatch.setattr(
        checkpoint,
        "read_state",
        lambda path: dataclasses.replace(state, **part) if path == other else read(path),
    )
    averaging.average(saved, [saved.path, one])
    with pytest.raises(checkpoint.CheckpointError, match=f"step-\\d+ has another {what} than .*"):
        averaging.average(saved, [saved.path, other])


def test_flips_and_averages_are_told_on_the_card(folder: Path) -> None:
    plain = trained_model.load(str(folder))
    flipped = trained_model.load(str(folder), ["evaluate.flip=true", "train.ema=0.9"])
    seen = trained_model.evaluate_saved(flipped)
    assert seen.loss != trained_model.evaluate_saved(plain).loss
    card = model_card.as_markdown(flipped, seen, "", [])
    assert "mean scores of each image and of its mirror image" in card
    assert "moving average of weights (0.9)" in card
    assert "mirror" not in model_card.as_markdown(plain, seen, "", [])

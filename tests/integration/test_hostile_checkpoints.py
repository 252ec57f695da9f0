"""Checkpoints of strangers: what they name is not run unless the user names it too."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Callable, Dict, List

import pytest
from mxnet import gluon

from trainer import checkpoint, config
from trainer.checkpoint import CheckpointError
from trainer.cli.main import main
from trainer.data import fashion_mnist
from trainer.errors import ConfigError
from trainer.inference import model_card, trained_model
from trainer.run.loop import fit

from . import nets
from .commands import SMALL

IDX = str(fashion_mnist.SAMPLE_FOLDER / "t10k-images-idx3-ubyte.gz")
NET = "model.factory=tests.integration.nets:small"
COMMANDS: Dict[str, Callable[[Path], List[str]]] = {
    "evaluate": lambda new: [],
    "predict": lambda new: [IDX],
    "export": lambda new: ["--no-onnx", f"--output={new}"],
    "calibrate": lambda new: ["--samples=4", f"--output={new}"],
    "average": lambda new: [f"--output={new}"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps, with a checkpoint after each."""
    output = tmp_path_factory.mktemp("runs")
    settings = ["train.max_steps=2", "checkpoint.every_steps=1", f"output={output}"]
    return fit(config=config.from_dict({}, [*SMALL, *settings])).folder


def newest(run: Path) -> Path:
    return checkpoint.listing(run / "checkpoints")[-1]


def changed(path: Path, **model: object) -> Path:
    """The checkpoint at ``path`` with other settings of its net, under a valid manifest."""
    state = json.loads((path / checkpoint.STATE).read_text())
    state["config"]["model"].update(model)
    (path / checkpoint.STATE).write_text(json.dumps(state))
    sums = json.loads((path / checkpoint.MANIFEST).read_text())
    sums[checkpoint.STATE] = hashlib.sha256((path / checkpoint.STATE).read_bytes()).hexdigest()
    (path / checkpoint.MANIFEST).write_text(json.dumps(sums))
    return path


@pytest.fixture
def hostile(trained: Path, tmp_path: Path) -> Path:
    """A run whose checkpoint makes its net by a command of the shell, which writes a file."""
    run = tmp_path / "theirs"
    shutil.copytree(trained, run)
    path = newest(run)
    changed(path, factory="os:system", arguments={"command": f"touch {tmp_path / 'ran'}"})
    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_what_a_checkpoint_names(
    command: str, hostile: Path, tmp_path: Path
) -> None:
    words = [command, str(hostile), *COMMANDS[command](tmp_path / "new")]
    with pytest.raises(ConfigError, match=r"os:system.*model\.factory=os:system.*--trust"):
        main(words, standalone_mode=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("overrides", [[], ["data.flip=false"], ["model.arguments={}"]])
def test_nor_does_python(overrides: List[str], hostile: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trust=True"):
        trained_model.load(str(hostile), overrides)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("factory", ["trainer.native.compile:compile_into", "trainer.cli.main:run"])
def test_other_functions_of_the_project_are_no_nets(hostile: Path, factory: str) -> None:
    path = newest(hostile)
    changed(path, factory=factory, arguments={})
    with pytest.raises(ConfigError, match="--trust"):
        trained_model.load(str(hostile))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("how", [[NET], ["--trust"]])
def test_what_the_user_names_is_run(
    command: str, how: List[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: List[gluon.Block] = []
    small = nets.small
    monkeypatch.setattr(nets, "small", lambda: made.append(small()) or made[-1])
    main([command, str(trained), *how, *COMMANDS[command](tmp_path / "new")], standalone_mode=False)
    assert len(made) == 1


def test_a_config_of_the_users_own_resumes_nothing_of_the_checkpoints(
    hostile: Path, tmp_path: Path
) -> None:
    """Resuming runs the command line's net, and compares it with the checkpoint's."""
    settings = ["train.max_steps=3", "monitor.loggers=[]", f"output={tmp_path / 'mine'}"]
    path = newest(hostile)
    with pytest.raises(CheckpointError, match="os:system"):
        fit(config=config.from_dict({}, [*SMALL, *settings]), resume=str(path))
    assert fit(config=config.from_dict({}, [*SMALL, *settings]), resume=str(path), force=True)
    assert not (tmp_path / "ran").exists()


def test_names_of_classes_are_text_in_a_model_card(trained: Path) -> None:
    saved = trained_model.load(str(trained), [NET])
    seen = trained_model.evaluate_saved(saved)
    hostile = ["<script>x()</script>", "a|b\n# c", "![x](http://h/)", "\x1b[8m", *"456789"]
    saved = saved._replace(class_names=hostile)
    card = model_card.as_markdown(saved, seen, "", [])
    for shown in (r"&lt;script&gt;x()&lt;/script&gt;", r"a\|b\\n# c", r"!\[x\](", r"\\x1b\[8m"):
        assert f"| {shown}" in card
    assert "<script" not in card and "\x1b" not in card

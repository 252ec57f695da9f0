"""Runs on pictures: the page's commands, any number of ranks, a resume, a skipped picture."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List

import mxnet as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mxnet import gluon
from mxnet.gluon.model_zoo import vision

from tests.documents import ROOT, blocks, typed
from tests.make_folder import make
from tests.unit.data.pictures import encoded, make_folder, make_records, smooth
from trainer.checkpoint import CheckpointError, params_file
from trainer.cli.main import main
from trainer.data import sharding
from trainer.data.fashion_mnist import SAMPLE_FOLDER
from trainer.inference import export, trained_model

from .commands import run, trainer
from .test_docs_commands import shell

PICTURES = [
    "data.dataset=folder",
    "data.image_size=24",
    "data.random_crop=true",
    "data.flip=true",
    "data.validation=0.2",
    "data.bad_samples=skip",
    "train.global_batch_size=7",
    "train.epochs=2",
    "model.factory=tests.integration.nets:Steady",
    "optimizer.lr=0.01",
    "batch_norm=sync",
    "monitor.every_steps=1",
    "monitor.loggers=[]",
]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    make_folder(root / "train", (9, 8, 10))
    make_folder(root / "test", (2, 2, 2))
    (root / "train" / "dog" / "05.jpeg").write_bytes(encoded(smooth(30, 30))[:300])
    return root


def events(*arguments: str, ranks: int = 1) -> Dict[str, List[Dict[str, Any]]]:
    """What a run says as JSON, by event."""
    done = run(trainer("train", *arguments, "--log-format=json", ranks=ranks))
    assert done.code == 0, done.out + done.err
    found: Dict[str, List[Dict[str, Any]]] = {"err": [{"text": done.err}]}
    for line in re.findall(r"\{.*\}", done.out):
        event = json.loads(line)
        found.setdefault(event["event"], []).append(event)
    return found


def test_ranks_and_a_resume_in_mid_epoch_change_nothing(pictures: Path, tmp_path: Path) -> None:
    fixed = [*PICTURES, f"data.folder={pictures}", f"output={tmp_path / 'runs'}"]
    alone = events(*fixed, "name=alone", "data.workers=0")
    losses = [step["loss"] for step in alone["step"]]
    assert alone["begin"][0]["validation_samples"] == 6  # of 9, 8 and 10 a fifth each
    assert "dog/05.jpeg is a bad picture" in alone["err"][0]["text"]
    assert [epoch["skipped_samples"] for epoch in alone["epoch"]] == [1, 1]
    for ranks in (2, 3):
        several = events(*fixed, f"name={ranks}", "data.workers=2", ranks=ranks)
        assert [step["loss"] for step in several["step"]] == pytest.approx(losses, rel=1e-4)
        assert [epoch["skipped_samples"] for epoch in several["epoch"]] == [1, 1]
    events(*fixed, "name=parts", "train.max_steps=4")
    rest = events(*fixed, "name=parts", ranks=2)
    assert [step["loss"] for step in rest["step"]] == pytest.approx(losses[4:], rel=1e-4)
    for found in (alone, several, rest):
        chosen, last = found["evaluation"][-2:]
        assert chosen["set"] == "validation" and last["set"] == "test" and last["samples"] == 6
        assert found["end"][0]["test_accuracy"] == last["accuracy"]
        assert sum(evaluation["set"] == "test" for evaluation in found["evaluation"]) == 1


def test_what_is_said_of_a_test_set_is_not_of_the_validation_set(
    pictures: Path, tmp_path: Path
) -> None:
    """The recorded accuracy is that of the validation set, the exported files' of the test set."""
    runs = tmp_path / "runs"
    fixed = [*PICTURES, f"data.folder={pictures}", f"output={runs}", "train.epochs=1", "name=one"]
    net = "model.factory=tests.integration.nets:smooth"
    assert run(trainer("train", *fixed, net)).code == 0
    saved = trained_model.load(str(runs / "one"), trust=True)
    assert saved.accuracy is not None and saved.chosen_on == "validation"
    seen = trained_model.evaluate_saved(saved)
    other = saved._replace(accuracy=seen.accuracy + 0.05)
    export.check_accuracy(other, seen, "test")
    with pytest.raises(CheckpointError, match="on this validation set, and .* was recorded"):
        export.check_accuracy(other, seen, "validation")
    for called in ("test", "validation"):
        done = run(trainer("evaluate", str(runs / "one"), "--trust"))
        told = f"{saved.path} (validation set; there is no test set): loss"
        assert done.code == 0 and done.out.startswith(told) == (called == "validation"), done.err
        exported = tmp_path / called
        done = run(trainer("export", str(runs / "one"), "--trust", f"--output={exported}"))
        assert done.code == 0 and f" {called} images, the checkpoint's" in done.out, done.err
        card = (exported / "model_card.md").read_text()
        assert f"images of the {called} set" in card and f"on the whole {called} set" in card
        assert ("on which the checkpoint was chosen" in card) == (called == "validation")
        if called == "test":
            shutil.rmtree(pictures / "test")


def test_a_bad_picture_stops_a_run_in_one_line(pictures: Path, tmp_path: Path) -> None:
    fixed = [*PICTURES, f"data.folder={pictures}", f"output={tmp_path / 'runs'}"]
    done = run(trainer("train", *fixed, "data.bad_samples=stop", "data.validation=0"))
    assert done.code == 2 and re.search(r"^error: .*05\.jpeg is a bad picture", done.err, re.M)


def test_a_bad_sample_in_mid_epoch_is_named_whichever_rank_meets_it(
    pictures: Path, tmp_path: Path
) -> None:
    def rank_of(sample: int, seed: int) -> int:
        """Which of two ranks trains on it in the first epoch of 27 samples."""
        batches = np.array_split(sharding.epoch_order(27, seed, 0), [7, 14, 21])
        return next(
            rank for b in batches for rank in (0, 1) if sample in sharding.shard(b, rank, 2)
        )

    fixed = [*PICTURES, f"data.folder={pictures}", f"output={tmp_path / 'runs'}"]
    for rank in (0, 1):
        seed = next(seed for seed in range(99) if rank_of(9 + 5, seed) == rank)
        others = ["data.bad_samples=stop", "data.validation=0", f"seed={seed}", f"name={rank}"]
        done = run(trainer("train", *fixed, *others, ranks=2))
        assert done.code, done.out
        assert len(re.findall(r"error: .*dog/05\.jpeg is a bad picture", done.err)) == 1, done.err


def test_records_without_a_test_set_train_and_predict(tmp_path: Path) -> None:
    root = tmp_path / "records"
    root.mkdir()
    samples = [(float(n % 3), encoded(smooth(30, 40, n % 3))) for n in range(24)]
    make_records(root / "train.rec", samples)
    fixed = [*PICTURES, "data.dataset=records", f"data.folder={root}", f"output={tmp_path}"]
    found = events(*fixed, "name=none", "data.validation=0")
    assert "evaluation" not in found and found["end"][0]["accuracy"] is None
    assert found["begin"][0]["test_samples"] is None
    done = run(trainer("train", *fixed, "data.validation=0", "train.patience=1", "name=other"))
    assert done.code == 2 and "there is nothing to evaluate" in done.err
    done = run(trainer("evaluate", str(tmp_path / "none"), "--trust"))
    assert done.code == 2 and "holds no test set" in done.err
    picture = tmp_path / "one.jpg"
    picture.write_bytes(encoded(smooth(30, 40)))
    done = run(trainer("predict", str(tmp_path / "none"), "--trust", str(picture)))
    assert done.code == 0 and done.out.startswith("image,class,probability,0,1,2")


@pytest.mark.parametrize("share", [0.2, 0])
def test_idx_files_without_a_test_set_are_trained_on_and_exported(
    share: float, tmp_path: Path
) -> None:
    """What is measured is measured on the validation set, or nothing is, and it says so."""
    root = tmp_path / "idx"
    shutil.copytree(SAMPLE_FOLDER, root, ignore=shutil.ignore_patterns("t10k-*"))
    net = ["model.factory=tests.integration.nets:smooth", "train.epochs=1", "monitor.loggers=[]"]
    fixed = ["data.dataset=idx", f"data.folder={root}", f"data.validation={share}"]
    found = events(*net, *fixed, f"output={tmp_path}", "name=one")
    assert found["begin"][0]["test_samples"] is None
    assert {e["set"] for e in found.get("evaluation", [])} == ({"validation"} if share else set())
    folder = str(tmp_path / "one")

    def asked(command: str, *options: str) -> str:
        done = CliRunner(mix_stderr=False).invoke(main, [command, folder, "--trust", *options])
        return done.stdout + str(done.exception or "")

    told = "(validation set; there is no test set)" if share else "holds no test set"
    assert told in asked("evaluate")
    told = r"validation accuracy 0\.\d+ -> 0\.\d+; wrote" if share else "wrote"
    assert re.match(f"{told} .*calibrated.params$", asked("calibrate"))
    assert (" 400 validation images" in asked("export", "--no-onnx")) == bool(share)
    card = (tmp_path / "one" / "exported" / "model_card.md").read_text()
    assert ("not measured: no test set was found" in card) != bool(share)


def test_half_a_test_set_is_refused(tmp_path: Path) -> None:
    shutil.copytree(SAMPLE_FOLDER, tmp_path / "idx", ignore=shutil.ignore_patterns("t10k-im*"))
    done = run(trainer("train", "data.dataset=idx", f"data.folder={tmp_path / 'idx'}"))
    assert done.code == 2 and "holds no file t10k-images-idx3-ubyte.gz" in done.err


def test_fine_tuning_on_folders_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")
    for split, count in (("train", 10), ("test", 3)):
        make_folder(tmp_path / "pets" / split, (count, count))
    shutil.copytree(tmp_path / "pets" / "test" / "cat", tmp_path / "holiday")
    zoo = vision.resnet18_v2()
    zoo.initialize()
    zoo(mx.nd.zeros((1, 3, 32, 32)))
    zoo.save_parameters(str(tmp_path / "resnet18_v2.params"))
    lines = [line for line in typed(ROOT / "docs" / "data.md") if "pets" in line]
    for line in lines:
        line = line.replace("image_size=224", "image_size=32").replace(".jpg", ".jpeg")
        if "train data" in line:
            line += " train.epochs=1 train.global_batch_size=6"
        said = shell(line, tmp_path)
        if " predict " in line:
            assert said.splitlines()[0] == "image,class,probability,cat,dog"
            assert len(said.splitlines()) == 3
        elif " export " in line:
            assert "wrote pets-model" in said
        else:
            assert re.search(r"model\.weights: \d+ of \d+ parameters are from", said)
            assert "so drawn anew: output.weight (1000, 512) -> (2, 512)" in said
    written = [path.read_bytes() for path in (tmp_path / "runs/pets").rglob("*tfevents*")]
    assert any(b"per_class/validation/cat" in content for content in written)
    card = (tmp_path / "pets-model" / "model_card.md").read_text()
    assert "| cat | 3 |" in card and "cut from the middle, the shorter side 37 pixels" in card
    import onnx

    model = onnx.load(str(tmp_path / "pets-model" / "model.onnx"))
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(found["classes"]) == ["cat", "dog"] and found["mean"] == "0.485, 0.456, 0.406"


def test_a_dataset_of_folders_as_the_page_says(tmp_path: Path) -> None:
    make_folder(tmp_path / "pets" / "train", (5, 5), size=(120, 110))
    (program,) = (b.text for b in blocks(ROOT / "docs" / "data.md") if b.language == "python")
    head = """
from mxnet.gluon.data.vision import ImageFolderDataset, transforms
from mxnet.gluon.model_zoo.vision import resnet18_v2
from trainer import Config, fit
from trainer.config import from_dict
net = resnet18_v2(classes=2)
few = {"name": "pets", "train": {"epochs": 1, "global_batch_size": 5}}
"""
    (tmp_path / "pets.py").write_text(
        head + program.replace('Config(name="pets")', "from_dict(few)")
    )
    done = run(["env", "-C", str(tmp_path), f"PYTHONPATH={ROOT}", sys.executable, "pets.py"])
    assert done.code == 0 and "10 training images, 1 epoch of 2 steps" in done.out, done.err
    assert "warning" not in done.err, done.err  # of draws that are not seeded


def test_parameters_that_weights_lack_or_have_to_spare_are_told(tmp_path: Path) -> None:
    nets = [gluon.nn.HybridSequential() for _ in range(2)]
    for net, widths in zip(nets, ((4, 3, 2), (4, 3))):
        net.add(*(gluon.nn.Dense(width) for width in widths))
        net.initialize()
        net(mx.nd.ones((1, 5)))
        net.save_parameters(str(tmp_path / f"{len(widths)}"))
    told = params_file.start_from(tmp_path / "3", nets[1])
    assert told[1:] == ["in the file alone: 2.weight, 2.bias"]
    told = params_file.start_from(tmp_path / "2", nets[0])
    assert told[1:] == ["not in the file, so drawn anew: 2.weight, 2.bias"]


def test_the_example_of_folders_trains_when_typed(tmp_path: Path) -> None:
    make(tmp_path / "pictures")
    assert sum(path.is_file() for path in (tmp_path / "pictures").rglob("*")) == 400
    goal = ["make", "-C", str(ROOT), "train", "CONFIG=configs/folder-example.yaml", "RANKS=2"]
    done = run([*goal, f"ARGS=output={tmp_path} train.epochs=1 train.max_steps=3"])
    assert done.code == 0, done.out + done.err
    assert "270 training, 30 validation and 100 test images" in done.out
    assert re.search(r"^done: validation accuracy 0\.\d+.*, test accuracy 0\.\d+", done.out, re.M)

"""Using a trained model: predictions for the user's images, and exported files."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Dict, List, Tuple

import click
import mxnet as mx
import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from mxnet.gluon import nn
from PIL import Image

from tests.unit.data.pictures import make_folder
from trainer import config
from trainer.batch_norm import SyncBatchNorm
from trainer.checkpoint import CheckpointError
from trainer.cli.main import main
from trainer.data import fashion_mnist, idx_file
from trainer.data.sources.base import ArraySource
from trainer.inference import export, images, predict, trained_model
from trainer.run.loop import fit

from . import nets
from .commands import ROOT, SMALL, run, trainer

IDX = str(fashion_mnist.SAMPLE_FOLDER / "t10k-images-idx3-ubyte.gz")
IMAGES, LABELS = fashion_mnist.load("test", dataset="fashion_mnist_sample")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run of one epoch."""
    output = tmp_path_factory.mktemp("runs")
    settings = [*SMALL, "train.epochs=1", "monitor.loggers=[]", f"output={output}"]
    return str(fit(config=config.from_dict({}, settings)).folder)


def _ask(trained: str, *arguments: str) -> Result:
    return CliRunner(mix_stderr=False).invoke(
        main, ["predict", trained, "--trust", *arguments], catch_exceptions=False
    )


def _answers(trained: str, *arguments: str) -> List[Dict[str, str]]:
    done = _ask(trained, *arguments)
    assert done.exit_code == 0, done.output
    return list(csv.DictReader(io.StringIO(done.stdout)))


def _shares(answers: List[Dict[str, str]]) -> np.ndarray:
    """Probabilities (N, 10); batches of other sizes may round their last digit otherwise."""
    return np.array([[float(a[name]) for name in fashion_mnist.CLASS_NAMES] for a in answers])


def test_answers_for_the_test_set_are_what_evaluation_counted(trained: str) -> None:
    answers = _answers(trained, IDX)
    right = [a["class"] == fashion_mnist.CLASS_NAMES[n] for a, n in zip(answers, LABELS)]
    assert len(answers) == 500
    model = trained_model.load(trained, trust=True)
    assert np.mean(right) == trained_model.evaluate_saved(model).accuracy
    assert answers[17]["image"] == f"{IDX}[17]"
    for answer in answers:
        shares = {name: float(answer[name]) for name in fashion_mnist.CLASS_NAMES}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert shares[answer["class"]] == max(shares.values()) == float(answer["probability"])


def test_no_name_becomes_a_formula_in_a_spreadsheet(trained: str) -> None:
    """Names of files and classes are of whoever sent them; numbers stay numbers."""
    names = ["=cmd|'/c x'!A1.png", "+x.png", "-x.png", "@x.png", "\tx.png", "shoe.png", "a=b.png"]
    pixels = np.zeros((len(names), 28, 28), np.uint8)
    classes = ["=1+1", "-1", "+2", "@x", "-x", *"56789"]
    shares = np.eye(10)[: len(names)]
    found = images.Images(names, pixels, [])
    text = predict.as_csv(predict.Predictions(found, classes, shares))
    header, *rows = csv.reader(io.StringIO(text))
    assert header[3:8] == ["'=1+1", "-1", "+2", "'@x", "'-x"]
    assert [row[1] for row in rows[:5]] == header[3:8]
    assert [row[0] for row in rows] == [f"'{name}" for name in names[:5]] + names[5:]


def test_files_folders_and_idx_files_of_the_same_pixels_agree(trained: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "below"
    folder.mkdir(parents=True)
    for index in range(3):
        Image.fromarray(IMAGES[index]).save(folder / f"{index}.PNG")
    (folder / "notes.txt").write_text("not looked at")
    plain = tmp_path / "three"
    plain.write_bytes(gzip.decompress(Path(IDX).read_bytes()))
    expected = _shares(_answers(trained, IDX)[:3])
    in_folder = _answers(trained, str(folder.parent))
    assert [answer["image"] for answer in in_folder] == [str(folder / f"{n}.PNG") for n in range(3)]
    np.testing.assert_allclose(_shares(in_folder), expected, atol=2e-5)
    np.testing.assert_allclose(_shares(_answers(trained, str(plain))[:3]), expected, atol=2e-5)
    two = _answers(trained, str(folder / "1.PNG"), str(folder / "0.PNG"))
    np.testing.assert_allclose(_shares(two), expected[[1, 0]], atol=2e-5)


def test_colour_size_transparency_and_negatives(trained: str, tmp_path: Path) -> None:
    """Each is the same garment, four times as large, in another kind of file."""
    large = Image.fromarray(IMAGES[0]).resize((112, 112), Image.Resampling.NEAREST)
    large.save(tmp_path / "grey.png")
    large.convert("RGB").save(tmp_path / "colour.png")
    Image.eval(large, lambda level: 255 - level).save(tmp_path / "negative.png")
    white = Image.new("L", large.size, 255)
    Image.merge("LA", (white, large)).save(tmp_path / "transparent.png")
    Image.merge("LA", (Image.new("L", large.size, 0), large)).save(tmp_path / "dark.png")
    expected = _shares(_answers(trained, str(tmp_path / "grey.png")))
    for name, options in (
        ("colour.png", []),
        ("negative.png", ["--invert"]),
        ("transparent.png", []),
        ("dark.png", ["--invert"]),
    ):
        shares = _shares(_answers(trained, str(tmp_path / name), *options))
        np.testing.assert_allclose(shares, expected, atol=2e-5, err_msg=name)
    wrong = _shares(_answers(trained, str(tmp_path / "negative.png")))
    assert np.abs(wrong - expected).max() > 0.01


def test_proportions_are_kept_and_photos_turned_upright(tmp_path: Path) -> None:
    wide = Image.new("L", (200, 100), 255)
    wide.save(tmp_path / "wide.png")
    (pixels,) = images.read([str(tmp_path / "wide.png")], (28, 28)).pixels
    assert pixels[7:21].min() == 255 and pixels[:7].max() == 0 and pixels[21:].max() == 0
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    wide.save(tmp_path / "photo.jpg", exif=exif)
    (pixels,) = images.read([str(tmp_path / "photo.jpg")], (28, 28)).pixels
    assert pixels[:, 8:20].min() > 250 and pixels[:, :6].max() < 5


def test_images_in_colour_are_read_for_a_net_that_takes_them(tmp_path: Path) -> None:
    red = np.zeros((10, 8, 4), np.uint8)
    red[..., 0], red[..., 3] = 200, 255
    red[0, 0] = 255, 255, 255, 0  # nothing, over which there is no colour
    Image.fromarray(red).save(tmp_path / "red.png")
    (pixels,) = images.read([str(tmp_path / "red.png")], (10, 8, 3)).pixels
    assert pixels.shape == (10, 8, 3) and pixels[5, 5].tolist() == [200, 0, 0]
    assert pixels[0, 0].tolist() == [0, 0, 0]
    (pixels,) = images.read([IDX], (28, 28, 3)).pixels[:1]
    np.testing.assert_array_equal(pixels, np.repeat(IMAGES[0][..., None], 3, axis=-1))
    with pytest.raises(idx_file.DataError, match="takes 2 channels"):
        images.read([IDX], (28, 28, 2))


COLOURED = np.random.RandomState(0).randint(0, 256, (8, 12, 16, 3)).astype(np.uint8), np.arange(8)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run on images given to fit, which are not kept."""
    settings = {
        "output": str(tmp_path_factory.mktemp("runs")),
        "model": {"factory": "tests.integration.nets:smooth"},
        "train": {"epochs": 1},
    }
    return str(fit(config=config.from_dict(settings), train=COLOURED, test=COLOURED).folder)


def test_a_net_of_given_images_is_asked_in_their_size_and_colours(
    coloured: str, tmp_path: Path
) -> None:
    """The checkpoint says how large they were; nobody knows that they were dark."""
    assert trained_model.load(coloured, trust=True).image_shape == (12, 16, 3)
    Image.new("RGB", (16, 12), (250, 240, 230)).save(tmp_path / "light.png")
    done = _ask(coloured, str(tmp_path / "light.png"))
    (answer,) = csv.DictReader(io.StringIO(done.stdout))
    assert sum(float(answer[str(n)]) for n in range(10)) == pytest.approx(1, abs=1e-4)
    assert not done.stderr


def test_images_that_are_not_kept_can_be_given_again(coloured: str) -> None:
    for command in ("evaluate", "calibrate"):
        with pytest.raises(idx_file.DataError, match="given to fit") as caught:
            main([command, coloured, "--trust"], standalone_mode=False)
        code = str(caught.value).split("in Python: ")[1].split("; calibrate_saved")[0]
        exec(code, {"images": COLOURED[0], "labels": COLOURED[1]})
    model, (images, labels) = trained_model.load(coloured, trust=True), COLOURED
    right = trained_model.scores(model, images).argmax(axis=1) == labels
    assert trained_model.evaluate_saved(model, test=COLOURED).accuracy == right.mean()
    before = model.net[1].running_mean.data().asnumpy()
    trained_model.calibrate_saved(model, train=COLOURED)
    assert np.abs(model.net[1].running_mean.data().asnumpy() - before).max() > 1e-3
    with pytest.raises(idx_file.DataError, match=r"images of \(28, 28\), the net of .* takes"):
        trained_model.evaluate_saved(model, (IMAGES, LABELS))


@pytest.mark.filterwarnings("ignore:Cannot decide type")  # MXNet's, of a symbol's input
def test_without_the_test_set_files_are_compared_on_noise(coloured: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main, ["export", coloured, "--trust", "--output", str(tmp_path)], catch_exceptions=False
    )
    assert done.exit_code == 0 and done.output.count("on 64 images of noise") == 2, done.output
    model = trained_model.load(coloured, trust=True)
    session = onnxruntime.InferenceSession(f"{tmp_path}/model.onnx")
    data = COLOURED[0].transpose(0, 3, 1, 2) / 255 - model.config.data.mean
    (found,) = session.run(None, {"data": (data / model.config.data.std).astype(np.float32)})
    np.testing.assert_allclose(
        found, trained_model.scores(model, COLOURED[0]), rtol=1e-4, atol=1e-4
    )
    assert session.get_modelmeta().custom_metadata_map["input"].startswith("3 channels, (pixel")
    card = (tmp_path / "model_card.md").read_text()
    assert "float32 (N, 3, 12, 16): 3 channels, 12 x 16 pixels" in card
    assert "| accuracy | not measured" in card and "shop photographs" not in card
    checked = export.export(model, ArraySource(*COLOURED), tmp_path / "again")
    assert [file.samples for file in checked] == [8, 8]
    assert "on 8 test images" in str(checked[1])


PHONE = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)


@pytest.mark.parametrize("content", [PHONE, bytes(99)], ids=["HEIC", "unknown"])
def test_files_of_other_kinds_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(idx_file.DataError) as caught:
        images.read([str(tmp_path / "x.bin")], (28, 28))
    assert "x.bin cannot be read: it is no picture that Pillow knows" in str(caught.value)


@pytest.mark.parametrize("kind", ["ico", "tga", "jp2"])
def test_images_that_begin_with_zeros_are_not_taken_for_idx(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    Image.fromarray(IMAGES[0]).convert("RGB").save(path)
    assert path.read_bytes()[:2] == b"\0\0"
    assert images.read([str(path)], (28, 28)).pixels.shape == (1, 28, 28)


def test_what_is_left_out_is_named_and_the_rest_predicted(trained: str, tmp_path: Path) -> None:
    Image.fromarray(IMAGES[0]).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "IMG_1.HEIC").write_bytes(PHONE)
    (tmp_path / ".DS_Store").write_bytes(b"hidden")
    for number in range(11):
        (tmp_path / f"note{number:02}.txt").write_text("no image")
    done = _ask(trained, str(tmp_path))
    assert done.exit_code == 0
    (answer,) = csv.DictReader(io.StringIO(done.stdout))
    assert answer["image"] == str(tmp_path / "whole.png")
    broken, others = done.stderr.splitlines()
    assert broken.startswith(f"skipped: {tmp_path}/half.png cannot be read: ")
    assert others.startswith(f"skipped: {tmp_path}: 12 files are of kinds that are not read: ")
    assert others.endswith("note08.txt and 2 more") and "below/IMG_1.HEIC, note00" in others
    with pytest.raises(idx_file.DataError, match=r"half\.png cannot be read"):
        _ask(trained, str(tmp_path), "--strict")
    (tmp_path / "half.png").unlink()
    with pytest.raises(idx_file.DataError, match="12 files are of kinds"):
        _ask(trained, str(tmp_path), "--strict")
    with pytest.raises(idx_file.DataError, match="1 file is of kinds .*: IMG_1.HEIC$"):
        _ask(trained, str(tmp_path / "below"))


def test_json_and_picture(trained: str, tmp_path: Path) -> None:
    for index in range(9):
        Image.fromarray(IMAGES[index]).save(tmp_path / f"{index}.png")
    out, picture = tmp_path / "answers.json", tmp_path / "picture"
    done = _ask(trained, str(tmp_path), "--output", str(out), "--picture", str(picture))
    assert done.exit_code == 0 and not done.stdout
    by_csv, by_json = _answers(trained, str(tmp_path)), json.loads(out.read_text())
    assert len(by_json) == 9
    for row, answer in zip(by_csv, by_json):
        assert (row["image"], row["class"]) == (answer["image"], answer["class"])
        assert float(row["probability"]) == answer["probability"]
        assert list(answer["probabilities"]) == list(fashion_mnist.CLASS_NAMES)
    assert json.loads(_ask(trained, str(tmp_path), "--format", "json").stdout) == by_json
    with Image.open(picture) as shown:
        assert (shown.width, shown.height) == (600, 600), "three rows of four"


def test_what_cannot_be_read_is_reported_in_one_line(trained: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "nothing.png").write_bytes(b"")
    Image.fromarray(IMAGES[0]).save(tmp_path / "whole.png")
    half = (tmp_path / "whole.png").read_bytes()[:200]
    (tmp_path / "half.png").write_bytes(half)
    Image.fromarray(IMAGES[0].astype(np.float32)).save(tmp_path / "float.tif")
    Image.new("L", (1, 5000)).save(tmp_path / "thin.png")
    header = b"\0\0\x0c\x03" + np.array([1, 28, 28], ">u4").tobytes()
    (tmp_path / "int32").write_bytes(header + IMAGES[0].astype(">i4").tobytes())
    labels = IDX.replace("images-idx3", "labels-idx1")
    for given, words in (
        ("missing.png", "there is no file or folder"),
        ("empty", "holds no image (*.png, *.jpg"),
        ("text.png", "cannot be read: it is no picture that Pillow knows"),
        ("nothing.png", "cannot be read: it is empty"),
        ("half.png", "cannot be read: it cannot be decoded: image file is truncated"),
        ("float.tif", "pixels of Pillow's mode F; convert it to grey or RGB of 8 bits"),
        ("thin.png", "is 1 x 5000 pixels, too narrow to be fitted into 28 x 28; crop it"),
        ("int32", "00000c03 (int32, 3-D), expected 00000803 (images: uint8, 3-D)"),
        (labels, "00000801 (uint8, 1-D), expected 00000803 (images: uint8, 3-D)"),
    ):
        with pytest.raises(idx_file.DataError) as caught:
            _ask(trained, str(tmp_path / given))
        assert words in str(caught.value) and "\n" not in str(caught.value), given
        assert Path(given).name in str(caught.value)


def test_what_is_made_of_a_checkpoint_without_a_run_has_no_default_place(
    trained: str, tmp_path: Path
) -> None:
    """In the folder above, that of another checkpoint may be."""
    (found,) = Path(trained).glob("checkpoints/step-*")
    lone = shutil.copytree(found, tmp_path / found.name)
    for command in (["export"], ["calibrate"], ["average", str(found)]):
        done = run(trainer(command[0], str(lone), *command[1:], "--trust"))
        assert done.code == 2 and "is in no run's folder: say where, by --output" in done.err
    assert list(tmp_path.iterdir()) == [lone]


def test_files_with_odd_names_are_answered_for_and_hidden_ones_left_out(
    trained: str, tmp_path: Path
) -> None:
    names = ["a b,c.png", "line\nbreak.png", "中文.png", os.fsdecode(b"no-utf8-\xff.png")]
    for name in (*names, "._a b,c.png"):  # the last one as macOS leaves them, no image
        Image.fromarray(IMAGES[0]).save(tmp_path / "x.png")
        (tmp_path / "x.png").rename(tmp_path / name)
    (tmp_path / "._a b,c.png").write_bytes(b"Mac OS X")
    shown = {str(tmp_path / name) for name in (*names[:3], "no-utf8-\\xff.png")}
    out = tmp_path / "answers.csv"
    assert {answer["image"] for answer in _answers(trained, str(tmp_path))} == shown
    assert _ask(trained, str(tmp_path), "--output", str(out)).exit_code == 0
    with out.open(newline="", encoding="utf-8") as file:
        assert {row["image"] for row in csv.DictReader(file)} == shown


def test_by_the_real_command_line(trained: str) -> None:
    done = run(trainer("predict", trained, "--trust", "missing.png"))
    assert (done.code, done.err) == (2, "error: there is no file or folder missing.png\n")
    for command, words in (
        (("predict", trained, "device=cpu"), "name the images to predict"),
        (("average", "device=cpu"), "name the checkpoints, or the run's folder, to average"),
    ):
        done = run(trainer(*command, "--trust"))
        assert done.code == 2 and words in done.err and done.err.count("\n") == 1
    quoted = shlex.join(trainer("config"))
    done = run(["bash", "-c", f"{quoted} > /dev/full"])
    said = "error: the standard output cannot be written: No space left on device\n"
    assert (done.code, done.err) == (2, said)
    done = run(["bash", "-c", f"{quoted} >&-"])
    assert (done.code, done.err) == (0, "")


def test_what_cannot_be_written_is_reported_in_one_line_and_nothing_is_lost(
    trained: str, tmp_path: Path
) -> None:
    nowhere, kept = tmp_path / "no" / "where", tmp_path / "kept.csv"
    kept.write_text("as it was")
    for options in (["--output", nowhere], ["--output", kept, "--picture", nowhere]):
        with pytest.raises(click.UsageError, match=f"^{nowhere} cannot be written: No such file"):
            main(["predict", trained, "--trust", IDX, *map(str, options)], standalone_mode=False)
    assert kept.read_text() == "as it was" and list(tmp_path.iterdir()) == [kept]


def test_what_calibrate_writes_is_read_by_the_other_commands(trained: str, tmp_path: Path) -> None:
    """Broken statistics are mended by it, and refused before."""
    broken, mended, bad = (str(tmp_path / f"{name}.params") for name in ("broken", "mended", "bad"))
    model = trained_model.load(trained, trust=True)
    weights = dict(model.net.collect_params())
    (mean,) = [n for n in weights if n.endswith("running_mean")][-1:]
    model.net.save_parameters(mended)
    right = trained_model.evaluate_saved(model).accuracy
    for path, name in ((broken, mean), (bad, next(n for n in weights if n.endswith("weight")))):
        keep = weights[name].data().copy()
        weights[name].set_data(keep + (1000 if path == broken else np.nan))
        model.net.save_parameters(path)
        weights[name].set_data(keep)

    def accuracy(params: str) -> float:
        done = CliRunner().invoke(main, ["evaluate", trained, "--trust", "--params", params])
        assert done.exit_code == 0, done
        assert done.output.startswith(f"{params}: loss ")
        return float(done.output.split("accuracy ")[1].split()[0])

    assert accuracy(mended) == pytest.approx(right, abs=1e-4) and accuracy(broken) < right - 0.1
    wrong = _shares(_answers(trained, IDX, "--params", broken))
    assert np.abs(wrong - _shares(_answers(trained, IDX))).max() > 0.1
    exported = tmp_path / "exported"
    words = ["export", trained, "--trust", "--no-onnx", f"--output={exported}", "--params", mended]
    CliRunner().invoke(main, words, catch_exceptions=False)
    assert "weights of mended.params" in (exported / "model_card.md").read_text()
    for params, said in (
        (bad, "bad.params holds weights that are not finite, of "),
        (str(tmp_path / "none"), "none cannot be used: No such file"),
        (str(ROOT / "Makefile"), "Makefile cannot be used: it is no file of MX"),
    ):
        with pytest.raises(CheckpointError, match=said):
            main(["evaluate", trained, "--trust", "--params", params], standalone_mode=False)


@pytest.mark.parametrize("command", ["evaluate", "predict", "export"])
def test_a_model_whose_scores_are_not_finite_is_refused(tmp_path: Path, command: str) -> None:
    net = nn.HybridLambda(lambda F, x: F.log(F.Flatten(x)[:, :10] - 1e9))
    net.initialize()
    settings = config.from_dict({"data": {"dataset": "fashion_mnist_sample"}})
    names = [str(number) for number in range(10)]
    model = trained_model.Saved(tmp_path, settings, net, mx.cpu(), (28, 28), names, None)
    with pytest.raises(CheckpointError, match="scores .* are not finite"):
        if command == "evaluate":
            trained_model.evaluate_saved(model)
        elif command == "predict":
            predict.predict(model, images.read([IDX], (28, 28)))
        else:
            export.export(model, (IMAGES, LABELS), tmp_path / "exported")


def test_calibrate_finds_an_unwritable_file_before_it_measures(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained_model, "evaluate_saved", lambda *_: pytest.fail("it has measured"))
    nowhere = tmp_path / "no" / "where"
    with pytest.raises(click.UsageError, match=f"^{nowhere} cannot be written: No such file"):
        main(["calibrate", trained, "--trust", "--output", str(nowhere)], standalone_mode=False)


@pytest.fixture(scope="module")
def exported(trained: str, tmp_path_factory: pytest.TempPathFactory) -> Tuple[Path, str]:
    """The folder of an export, and what the command said."""
    folder = tmp_path_factory.mktemp("exported")
    done = CliRunner().invoke(
        main, ["export", trained, "--trust", "--output", str(folder)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return folder, done.output


@pytest.mark.filterwarnings("ignore:Cannot decide type")  # MXNet's, of a symbol's input
def test_what_is_exported_computes_the_same(trained: str, exported: Tuple[Path, str]) -> None:
    """Looked at with the other tools alone: nothing of this project reads the files."""
    folder, said = exported
    model = trained_model.load(trained, trust=True)
    assert any(isinstance(p, SyncBatchNorm) for p in model.net._children.values())
    expected = trained_model.scores(model, IMAGES)
    data = (IMAGES[:, None] / 255 - model.config.data.mean) / model.config.data.std
    data = data.astype(np.float32)
    net = mx.gluon.SymbolBlock.imports(
        f"{folder}/model-symbol.json", ["data"], f"{folder}/model-0000.params"
    )
    np.testing.assert_allclose(net(mx.nd.array(data)).asnumpy(), expected, rtol=1e-4, atol=1e-4)
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
    (given,) = session.get_inputs()
    assert (given.name, given.shape) == ("data", [None, 1, 28, 28])
    for count in (1, 7, 500):
        (found,) = session.run(None, {"data": data[:count]})
        np.testing.assert_allclose(found, expected[:count], rtol=1e-4, atol=1e-4)
    described = session.get_modelmeta().custom_metadata_map
    assert json.loads(described["classes"]) == list(fashion_mnist.CLASS_NAMES)
    accuracy = trained_model.evaluate_saved(model).accuracy
    for name in ("model-symbol.json", "model.onnx"):
        line = (
            f"{name}: accuracy {accuracy:.4f} on 500 test images, the checkpoint's {accuracy:.4f}"
        )
        assert line in said


def test_without_onnx_nothing_of_it_is_needed(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)  # importing it fails
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "mine.txt").touch()
    words = ["export", trained, "--trust", "--output", str(tmp_path), "--no-onnx"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    left = ["model-0000.params", "model-symbol.json", "model_card.md"]
    assert done.output.endswith(f"wrote {tmp_path}: {', '.join(left)}\n")
    assert {path.name for path in tmp_path.iterdir()} == {*left, "mine.txt"}


def test_a_model_card_stands_beside_it(trained: str, exported: Tuple[Path, str]) -> None:
    card = (exported[0] / "model_card.md").read_text()
    seen = trained_model.evaluate_saved(trained_model.load(trained, trust=True))
    for words in (
        f"**{seen.accuracy:.4f}** on the 500 images",
        "`fashion_mnist_sample`",
        "| seed | 0 |",
        f"MXNet {mx.__version__}",
        "factory: tests.integration.nets:small",
        "python -m trainer",
        "model.onnx: accuracy",
    ):
        assert words in card
    for label, name in enumerate(fashion_mnist.CLASS_NAMES):
        assert f"| {name} | 50 | {seen.class_accuracy[label]:.1%} |" in card
    settings = card.split("```yaml\n")[1].split("```")[0]
    path = exported[0] / "again.yaml"
    path.write_text(settings)
    assert config.load(str(path)) == trained_model.load(trained, trust=True).config


def test_what_cannot_be_exported_is_reported_in_one_line(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = trained_model.load(trained, trust=True), tmp_path / "exported"
    imperative = model._replace(net=nets.imperative())
    looking = nets.LooksAtItsShape()
    looking.initialize()

    def refusal(model: trained_model.Saved, folder: Path = output) -> str:
        with pytest.raises(export.ExportError) as raised:
            export.export(model, (IMAGES, LABELS), folder)
        assert "\n" not in str(raised.value) and not output.exists()
        return str(raised.value)

    assert "is a Imperative, an imperative Block" in refusal(imperative)
    cannot = "LooksAtItsShape cannot be made a symbol: "
    assert cannot in refusal(model._replace(net=looking), tmp_path / "begun")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -r requirements-export.txt" in refusal(model)


def test_a_file_that_computes_something_else_is_refused(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a converter translates an operator wrongly: here one weight differs in the file."""
    write = mx.gluon.HybridBlock.export

    def write_another(net: mx.gluon.HybridBlock, path: str, epoch: int) -> None:
        bias = list(net.collect_params(".*bias").values())[-1]
        bias.set_data(bias.data() + 0.01)
        write(net, path, epoch)

    monkeypatch.setattr(mx.gluon.HybridBlock, "export", write_another)
    with pytest.raises(
        export.ExportError, match="model-symbol.json: .* difference of a score 1.0e"
    ):
        main(["export", trained, "--trust", f"--output={tmp_path}/new"], standalone_mode=False)
    assert not (tmp_path / "new").exists()


def test_a_run_keeps_its_class_names_with_other_files(trained: str, tmp_path: Path) -> None:
    """The same files as a set that nobody knows; then with labels that the net has no class for."""
    own = ["data.dataset=idx", f"data.folder={fashion_mnist.SAMPLE_FOLDER}"]
    assert _answers(trained, IDX, *own) == _answers(trained, IDX)
    for name in fashion_mnist.FILES["test"]:
        content = gzip.decompress((fashion_mnist.SAMPLE_FOLDER / f"{name}.gz").read_bytes())
        (tmp_path / name).write_bytes(content[:-1] + b"\x0b" if "labels" in name else content)
    model = trained_model.load(trained, ["data.dataset=idx", f"data.folder={tmp_path}"], trust=True)
    with pytest.raises(idx_file.DataError, match="has 12 classes, the net of .* 10; give the"):
        trained_model.evaluate_saved(model)


@pytest.fixture(scope="module")
def on_folder(tmp_path_factory: pytest.TempPathFactory) -> Tuple[str, Path]:
    """The folder of a run on pictures, a third of them kept out; and the pictures."""
    place = tmp_path_factory.mktemp("pets")
    make_folder(place / "pets", (6, 6))
    settings = [
        *("data.dataset=folder", f"data.folder={place / 'pets'}", "data.validation=0.34"),
        *("data.image_size=24", "train.global_batch_size=4", "train.epochs=2", "train.max_steps=3"),
        *("model.factory=tests.integration.nets:smooth", "monitor.loggers=[]", f"output={place}"),
    ]
    return str(fit(config=config.from_dict({}, settings)).folder), place / "pets"


def _asked(*words: str) -> str:
    done = CliRunner(mix_stderr=False).invoke(main, [*words, "--trust"])
    return done.stdout + done.stderr + str(done.exception or "")


def test_a_net_of_a_run_with_a_split_is_evaluated_elsewhere(
    on_folder: Tuple[str, Path], tmp_path: Path
) -> None:
    run_of, pets = on_folder
    own = _asked("evaluate", run_of)
    assert "(validation set; there is no test set): loss" in own and "  (4 images)\n" in own
    moved = shutil.copytree(pets, tmp_path / "moved")
    assert _asked("evaluate", run_of, f"data.folder={moved}") == own
    for path in moved.glob("*/*"):
        path.rename(path.with_name(f"x{path.name}"))
    for other in (f"data.folder={moved}", "data.validation=0.5", "seed=1"):  # hold trained ones
        assert "holds no test set, as FOLDER/test/" in _asked("evaluate", run_of, other)
    (tmp_path / "new").mkdir()
    moved.rename(tmp_path / "new" / "test")
    said = _asked("evaluate", run_of, f"data.folder={tmp_path / 'new'}")
    assert "step-00000003: loss" in said and "  (12 images)\n" in said


def test_names_of_classes_can_be_given_later(on_folder: Tuple[str, Path], tmp_path: Path) -> None:
    run_of, pets = on_folder
    names = tmp_path / "names"
    names.write_text("Katze\nHund\n")
    picture = str(next(pets.glob("cat/*")))
    said = _asked("predict", run_of, picture, f"data.class_names={names}")
    assert said.startswith("image,class,probability,Katze,Hund,score 2,")
    assert _asked("predict", run_of, picture).startswith("image,class,probability,cat,dog,score 2,")
    said = _asked("predict", run_of, picture, f"data.class_names={tmp_path / 'none'}")
    assert "none, which cannot be read: No such file" in said


def test_a_net_in_colour_is_not_asked_in_grey(on_folder: Tuple[str, Path]) -> None:
    run_of, pets = on_folder
    said = _asked("predict", run_of, str(next(pets.glob("cat/*"))), "data.channels=1")
    assert re.search(r"the images are read as \(24, 24\), the net of .* takes \(24, 24, 3\)", said)


@pytest.mark.parametrize("words", [False, True])
def test_a_net_of_labels_from_1_or_in_words_answers_with_them(words: bool, tmp_path: Path) -> None:
    """By the command line, in predictions, exported files and their card."""
    images, labels = fashion_mnist.load("test", dataset="fashion_mnist_sample")
    chosen = np.flatnonzero(labels < 4)[:40]
    own = np.array(["ant", "bee", "cow", "dog"])[labels[chosen]] if words else labels[chosen] + 1
    settings = [*SMALL, "train.epochs=1", "monitor.loggers=[]", f"output={tmp_path}"]
    given = {"train": (images[chosen], own), "test": (images[chosen], own)}
    folder = str(fit(config=config.from_dict({}, settings), **given).folder)
    names = ["ant", "bee", "cow", "dog"] if words else list("1234")
    answers = _answers(folder, IDX)
    assert list(answers[0])[3:7] == names
    assert {answer["class"] for answer in answers} <= {
        *names,
        *(f"score {n}" for n in range(4, 10)),
    }
    exported = tmp_path / "exported"
    assert "wrote" in _asked("export", folder, f"--output={exported}")
    import onnx

    model = onnx.load(str(exported / "model.onnx"))
    kept = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(kept["classes"])[:4] == names
    seen = trained_model.evaluate_saved(trained_model.load(folder, trust=True), test=given["test"])
    assert seen.samples == 40 and seen.confusion[:4].sum(axis=1).tolist() == [
        *np.bincount(labels[chosen])
    ]


def test_without_the_data_of_a_run_its_net_is_still_exported_and_averaged(
    on_folder: Tuple[str, Path], tmp_path: Path
) -> None:
    run_of, pets = on_folder
    out = f"--output={tmp_path / 'exported'}"
    assert "model.onnx: accuracy" in _asked("export", run_of, out)
    pets.rename(pets.with_name("away"))
    try:
        said = _asked("export", run_of, out, "--no-onnx")
        why = f"warning: no accuracy is measured: folder {pets} cannot be read: No such file"
        assert why in said and "on 64 images of noise" in said
        assert "model_card.md; removed the earlier model.onnx\n" in said
        assert not (tmp_path / "exported" / "model.onnx").exists()
        card = (tmp_path / "exported" / "model_card.md").read_text()
        assert "not measured: no test set was found" in card
        assert "| checkpoint | step-00000003, of a run of up to 2 epochs of global batch 4," in card
        mean = f"--output={tmp_path / 'mean'}"
        said = _asked("average", run_of, mean)
        assert why in said and f"wrote {tmp_path / 'mean'}, the mean of " in said
        # What is named on the command line must be there.
        said = _asked("average", run_of, mean, f"data.folder={tmp_path / 'typo'}")
        assert "typo cannot be read" in said and "wrote" not in said
    finally:
        pets.with_name("away").rename(pets)

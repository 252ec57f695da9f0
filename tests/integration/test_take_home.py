"""What a trained model is good for at home: answers for one's own images, files for other tools."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Dict, List

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from trainer import config, fashion_mnist, fit, saved
from trainer.__main__ import main

from .commands import SMALL, run, trainer

IDX = str(fashion_mnist.SAMPLE_FOLDER / "t10k-images-idx3-ubyte.gz")
IMAGES, LABELS = fashion_mnist.load("test", dataset="fashion_mnist_sample")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run of one epoch."""
    output = tmp_path_factory.mktemp("runs")
    settings = [*SMALL, "train.epochs=1", "monitor.tensorboard=false", f"output={output}"]
    return str(fit(config=config.from_dict({}, settings)).folder)


def _ask(trained: str, *arguments: str) -> Result:
    return CliRunner(mix_stderr=False).invoke(
        main, ["predict", trained, *arguments], catch_exceptions=False
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
    assert np.mean(right) == saved.evaluate_saved(saved.load(trained)).accuracy
    assert answers[17]["image"] == f"{IDX}[17]"
    for answer in answers:
        shares = {name: float(answer[name]) for name in fashion_mnist.CLASS_NAMES}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert shares[answer["class"]] == max(shares.values()) == float(answer["probability"])


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


def test_proportions_are_kept_and_photos_turned_upright(trained: str, tmp_path: Path) -> None:
    from trainer import images

    wide = Image.new("L", (200, 100), 255)
    wide.save(tmp_path / "wide.png")
    (pixels,) = images.read([str(tmp_path / "wide.png")], (28, 28)).pixels
    assert pixels[7:21].min() == 255 and pixels[:7].max() == 0 and pixels[21:].max() == 0
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    wide.save(tmp_path / "photo.jpg", exif=exif)
    (pixels,) = images.read([str(tmp_path / "photo.jpg")], (28, 28)).pixels
    assert pixels[:, 8:20].min() > 250 and pixels[:, :6].max() < 5


def test_light_backgrounds_are_told_of_never_guessed(trained: str, tmp_path: Path) -> None:
    Image.fromarray(255 - IMAGES[0]).save(tmp_path / "light.png")
    Image.fromarray(IMAGES[0]).save(tmp_path / "dark.png")
    done = _ask(trained, str(tmp_path))
    assert "note: 1 of 2 images have a light background" in done.stderr
    assert "--invert?" in done.stderr and "note" not in done.stdout
    assert not _ask(trained, str(tmp_path / "dark.png")).stderr


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
        assert (shown.width, shown.height) == (960, 288), "two rows of eight"


def test_what_cannot_be_read_is_told_in_one_line(trained: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "nothing.png").write_bytes(b"")
    Image.fromarray(IMAGES[0]).save(tmp_path / "whole.png")
    half = (tmp_path / "whole.png").read_bytes()[:200]
    (tmp_path / "half.png").write_bytes(half)
    Image.fromarray(IMAGES[0].astype(np.uint16) << 8).save(tmp_path / "deep.png")
    labels = IDX.replace("images-idx3", "labels-idx1")
    for given, words in (
        ("missing.png", "there is no file or folder"),
        ("empty", "holds no image (*.png, *.jpg"),
        ("text.png", "neither an image that Pillow knows nor an IDX file"),
        ("nothing.png", "neither an image"),
        ("half.png", "cannot be read: image file is truncated"),
        ("deep.png", "more than 8 bits a pixel"),
        (labels, "00000801, expected 00000803 (images)"),
    ):
        with pytest.raises(fashion_mnist.DataError) as caught:
            _ask(trained, str(tmp_path / given))
        assert words in str(caught.value) and "\n" not in str(caught.value), given
        assert Path(given).name in str(caught.value)


def test_by_the_real_command_line(trained: str) -> None:
    done = run(trainer("predict", trained, "missing.png"))
    assert (done.code, done.err) == (2, "error: there is no file or folder missing.png\n")


def test_what_cannot_be_written_is_told_in_one_line(trained: str, tmp_path: Path) -> None:
    output = str(tmp_path / "no" / "where.csv")
    with pytest.raises(click.UsageError, match=f"^{output} cannot be written: No such file"):
        main(["predict", trained, IDX, "--output", output], standalone_mode=False)

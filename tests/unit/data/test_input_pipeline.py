"""The user's own arrays: which are accepted, and which refused before anything starts."""

from __future__ import annotations

import re

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon.data import ArrayDataset, DataLoader

from trainer.config import Data
from trainer.data import arrays, fashion_mnist, input_pipeline
from trainer.data.idx_file import DataError

IMAGES = np.zeros((6, 4, 5), np.uint8)
LABELS = np.arange(6)
SET = (IMAGES, LABELS)


def test_given_sets_are_taken_as_they_are():
    train, _, test = input_pipeline.read(Data(dataset="idx", folder="/nonexistent"), SET, SET)
    assert train.images is IMAGES and test.labels is LABELS


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (IMAGES, "train is a ndarray; it must be (images, labels)"),
        ((IMAGES / 255, LABELS), "train images are float64 (6, 4, 5); they must be uint8"),
        ((IMAGES / 255, LABELS), "(images * 255).round().astype('uint8')"),
        ((IMAGES + 2.0, LABELS), "images.round().astype('uint8')"),
        ((IMAGES[:, None], LABELS), "images.transpose(0, 2, 3, 1)"),
        ((IMAGES[:, :0], LABELS), "train images are uint8 (6, 0, 5); they must be"),
        ((IMAGES[:, 0], LABELS), "(6, 5); they must be uint8 (N, height, width)"),
        (DataLoader(ArrayDataset(*SET), 2), "train is a DataLoader; .*: give what it reads"),
        (mx.io.NDArrayIter(*SET), "train is a NDArrayIter; .*: give what it reads"),
        (ArrayDataset(IMAGES, np.eye(6)), "train labels are int64 (6, 6); .*: labels.argmax"),
        (ArrayDataset(IMAGES), "train[0] is a ndarray; a dataset must give (image, label)"),
        (ArrayDataset([IMAGES[0], IMAGES[0, 1:]], [0, 1]), "train[1] has an image of (3, 5)"),
        ((IMAGES.tolist(), LABELS), "train images are a list; they must be a NumPy array"),
        ((mx.nd.array(IMAGES), LABELS), "an MXNet array gives one by .asnumpy()"),
        ((IMAGES, LABELS.astype(np.float32)), "train labels are float32 (6,)"),
        ((IMAGES, LABELS[:5]), "train labels are int64 (5,); .* of each of the 6 images"),
        ((IMAGES, np.eye(6, dtype=int)), "labels are int64 (6, 6); .*: labels.argmax(axis=1)"),
        ((IMAGES, LABELS[:, None]), "train labels are int64 (6, 1); .*: labels.ravel()"),
        ((IMAGES[:0], LABELS[:0]), "train holds no image"),
        ((IMAGES, LABELS - 1), "train labels hold -1; classes are numbered from 0"),
    ],
)
def test_an_invalid_dataset_is_reported_in_one_line(given, expected):
    with pytest.raises(DataError) as raised:
        input_pipeline.read(Data(), given, SET)
    position = -1
    for part in expected.split(".*"):
        position = str(raised.value).find(part, position + 1)
        assert position >= 0, str(raised.value)
    assert "\n" not in str(raised.value)


def _said(raised) -> str:
    """The line, from its advice on."""
    return str(raised.value).split("data.std): ")[1].split("Normalize out, or ")[-1]


PIXELS = np.random.RandomState(3).randint(0, 256, (6, 4, 5, 3)).astype(np.uint8)
PIXELS[0, 0, 0] = 0, 255, 128
FLOATS = PIXELS.astype(np.float32)


@pytest.mark.parametrize(
    ("images", "tolerance"),
    [
        (FLOATS / 255, 0),
        (FLOATS.astype(np.float64) / 255, 0),
        (FLOATS, 0),
        (PIXELS.astype(np.int64), 0),
        (PIXELS.astype(np.uint16) << 8, 0),
        ((PIXELS.astype(int) - 128).astype(np.int8), 0),
        (FLOATS / 127.5 - 1, 0),
        ((FLOATS - 73) / 90, 0),
        ((FLOATS / 255).astype(np.float16), 1),
        (PIXELS > 127, 127),
    ],
)
@pytest.mark.parametrize("channels_first", [False, True])
def test_the_advice_gives_the_pixels_back(images, tolerance, channels_first):
    """Both sets', by the same line: a smaller range of the test set is no reason for another."""
    given = images.transpose(0, 3, 1, 2) if channels_first else images
    ends = {"low": float(images.min()), "high": float(images.max())}
    for name in ("train", "test"):
        part = given if name == "train" else given[1:]
        with pytest.raises(DataError) as raised:
            arrays.given(name, (part, LABELS[: len(part)]), Data())
        (code,) = re.findall(r"((?:\(?images|np\.).*?)(?:, (?:for|low) .*)?$", _said(raised))
        changed = eval(code, {"np": np, "images": part, **ends})
        found, _ = arrays.given(name, (changed, LABELS[: len(part)]), Data())
        wanted = PIXELS if name == "train" else PIXELS[1:]
        assert np.abs(found.astype(int) - wanted).max() <= tolerance, code


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_images_that_are_not_finite_are_said_to_be(wrong):
    images = FLOATS.copy()
    images[1, 2, 3] = wrong
    with pytest.raises(DataError, match="not finite"):
        arrays.given("train", (images, LABELS), Data())


ENDS_ONLY = "hold numbers near 0 and near 255 only"


@pytest.mark.parametrize(
    ("images", "held"),
    [
        ((FLOATS / 255).astype(np.uint8), "hold 0 to 1 only"),
        (PIXELS // 16, "hold 0 to 15 only"),
        (
            ((FLOATS - 73) / 30).astype(np.int64).astype(np.uint8),
            ENDS_ONLY,
        ),
        (
            (FLOATS / 127.5 - 1).astype(np.int64).astype(np.uint8),
            ENDS_ONLY,
        ),
        (PIXELS, None),
        (PIXELS // 4, None),
        (np.uint8(255) * (PIXELS > 127), None),
    ],
)
def test_pixels_in_a_corner_of_the_range_are_told_of(images, held, capfd):
    arrays.given("train", (images, LABELS), Data())
    said = capfd.readouterr().err
    if held is None:
        assert not said
    else:
        assert said.count("\n") == 1 and f"warning: train images {held}" in said


def test_the_test_set_is_looked_at_too():
    with pytest.raises(DataError, match="test labels hold -1"):
        input_pipeline.read(Data(), SET, (IMAGES, LABELS - 1))


def test_images_in_colour_and_with_an_axis_of_one_channel():
    colour, grey = np.zeros((6, 4, 5, 3), np.uint8), IMAGES[..., None]
    train, _, test = input_pipeline.read(Data(), (colour, LABELS), (colour, LABELS))
    assert train.images is colour
    train, _, test = input_pipeline.read(Data(), (grey, LABELS), SET)
    assert train.image_shape == test.image_shape
    sets = input_pipeline.read(Data(), (colour, LABELS), SET)
    with pytest.raises(DataError, match=r"images are \(4, 5, 3\), test images \(4, 5\); "):
        input_pipeline.check_shapes(sets, Data())


def test_a_gluon_dataset_in_memory_is_read():
    draw = np.random.RandomState(0)
    images = draw.randint(0, 256, (6, 4, 5, 3)).astype(np.uint8)
    dataset = ArrayDataset(mx.nd.array(images, dtype="uint8"), LABELS.astype(np.float32))
    train = input_pipeline.read(Data(), dataset).train
    np.testing.assert_array_equal(train.images, images)
    np.testing.assert_array_equal(train.labels, LABELS)


def test_own_images_are_not_mixed_with_fashion_mnist():
    assert input_pipeline.read(Data(), SET).test is None
    with pytest.raises(DataError, match="give both"):
        input_pipeline.read(Data(), None, SET)


def test_sets_of_two_sizes_need_a_common_one():
    other = (IMAGES[:, :, 1:], LABELS)
    sets = input_pipeline.read(Data(), SET, other)
    with pytest.raises(DataError, match=r"training images are \(4, 5\), test images \(4, 4\)"):
        input_pipeline.check_shapes(sets, Data())
    input_pipeline.check_shapes(sets, Data(image_size=4))


def test_a_run_on_arrays_is_not_taken_for_one_on_fashion_mnist():
    assert fashion_mnist.class_names("arrays", 2) == ["0", "1"]
    assert fashion_mnist.class_names("fashion_mnist_sample", 11)[8:] == ["bag", "ankle boot", "10"]
    with pytest.raises(DataError, match="given to fit"):
        input_pipeline.read(Data(dataset="arrays"))

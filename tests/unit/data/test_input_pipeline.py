"""The user's own arrays: which are accepted, and which refused before anything starts."""

from __future__ import annotations

import contextlib
import re
import tracemalloc

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon.data import ArrayDataset, DataLoader

from trainer.config import Data, from_dict
from trainer.data import arrays, classes, input_pipeline, sharding
from trainer.data.idx_file import DataError

from .pictures import encoded

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
        ((IMAGES / 255, LABELS), "train images are float64 (6, 4, 5); each must be uint8"),
        ((IMAGES / 255, LABELS), "fit scales pixels (data.mean, data.std): leave ToTensor"),
        ((IMAGES.astype(int), LABELS), "if they are 0 to 255: images.astype('uint8')"),
        (
            (IMAGES, LABELS.tolist()),
            "train labels are a list; they must be a NumPy or MXNet array: np.as",
        ),
        ((IMAGES[:, None], LABELS), "channels come last: np.moveaxis(images, -3, -1)"),
        ((IMAGES[:, :0], LABELS), "train images are uint8 (6, 0, 5); each must be"),
        ((IMAGES[:, 0], LABELS), "(6, 5); each must be uint8 (height, width)"),
        (DataLoader(ArrayDataset(*SET), 2), "train is a DataLoader; .*: give what it reads"),
        (mx.io.NDArrayIter(*SET), "train is a NDArrayIter; .*: give what it reads"),
        (ArrayDataset(IMAGES, np.eye(6)), "train labels are int64 (6, 6); .*: labels.argmax"),
        (ArrayDataset(IMAGES), "train[0] is a ndarray; a dataset must give (image, label)"),
        (ArrayDataset([IMAGES[0], IMAGES[0, 1:]], [0, 1]), "train[1] has an image of (3, 5)"),
        (
            (IMAGES.tolist(), LABELS),
            "train images are a list; they must be a NumPy or MXNet array: np.as",
        ),
        ((mx.nd.array(IMAGES), LABELS), "train images are float32 (6, 4, 5); each must be uint8"),
        ((IMAGES, LABELS.astype(np.float32)), "train labels are float32 (6,)"),
        ((IMAGES, LABELS.astype("S1")), "train labels are |S1 (6,); .*: labels.astype(str)"),
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


PIXELS = np.random.RandomState(3).randint(0, 256, (6, 4, 5, 3)).astype(np.uint8)
PIXELS[0, 0, 0] = 0, 255, 128
FLOATS = PIXELS.astype(np.float32)
ENDS_ONLY = "hold numbers near 0 and near 255 only"


@pytest.mark.parametrize(
    ("images", "held"),
    [
        ((FLOATS / 255).astype(np.uint8), "hold 0 to 1 only"),
        (PIXELS // 16, "hold 0 to 15 only"),
        (((FLOATS - 73) / 30).astype(np.int64).astype(np.uint8), ENDS_ONLY),
        ((FLOATS / 127.5 - 1).astype(np.int64).astype(np.uint8), ENDS_ONLY),
        (PIXELS, None),
        (PIXELS // 4, None),
        (np.uint8(255) * (PIXELS > 127), None),
    ],
)
@pytest.mark.parametrize("kind", ["arrays", "dataset"])
def test_pixels_in_a_corner_of_the_range_are_told_of(images, held, kind, capfd):
    given = images, LABELS
    if kind == "dataset":  # with a transform, so that it is read when it is needed
        given = ArrayDataset(images, LABELS).transform(lambda image, label: (image, label))
    with contextlib.closing(input_pipeline.read(Data(), given)) as sets:
        input_pipeline.tell_of_ranges(sets, Data())
    said = capfd.readouterr().err
    if held is None:
        assert not said
    else:
        assert said.count("\n") == 1 and f"warning: training images {held}" in said


@pytest.mark.parametrize("divisor", [1, 16])
def test_pictures_of_a_folder_in_a_corner_of_the_range_are_told_of(divisor, capfd, tmp_path):
    for number, image in enumerate(PIXELS // divisor):
        place = tmp_path / "train" / str(number) / "image.png"
        place.parent.mkdir(parents=True)
        place.write_bytes(encoded(image, "PNG"))
    settings = Data("folder", str(tmp_path), image_size=4)
    with contextlib.closing(input_pipeline.read(settings)) as sets:
        input_pipeline.tell_of_ranges(sets, settings)
    said = capfd.readouterr().err
    assert bool(re.search(r"training images hold \d+ to \d+ only", said)) == (divisor == 16), said


def test_a_bad_sample_is_not_told_of_before_it_is_trained_on(capfd):
    samples = ArrayDataset(IMAGES, LABELS).transform(lambda image, label: (image / 2, label))
    with contextlib.closing(input_pipeline.read(Data(bad_samples="skip"), samples)) as sets:
        sets.train._shape = (4, 5)
        input_pipeline.tell_of_ranges(sets, Data(bad_samples="skip"))
    assert not capfd.readouterr().err and not len(sets.train.skipped)


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


def test_mxnets_arrays_are_taken_as_those_in_a_dataset():
    given = mx.nd.array(PIXELS, dtype="uint8"), mx.nd.array(LABELS)
    train = input_pipeline.read(Data(), given).train
    assert (train.images == PIXELS).all() and train.labels.tolist() == LABELS.tolist()
    with pytest.raises(DataError, match="train labels are float32"):
        input_pipeline.read(Data(), (given[0], given[1] / 2))


def test_a_list_of_samples_is_read():
    train = input_pipeline.read(Data(), list(zip(PIXELS, LABELS.tolist())), SET).train
    assert (train.images == PIXELS).all() and train.labels.tolist() == LABELS.tolist()
    with pytest.raises(DataError, match="train is a list; it must be"):
        input_pipeline.read(Data(), [1, 2, 3], SET)


def test_the_look_at_ranges_takes_little_memory():
    images = np.zeros((64, 512, 512), np.uint8)
    images[:, 0, :256] = np.arange(256)
    tracemalloc.start()
    arrays.tell_of_range("training", images)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < images.nbytes / 4


def test_own_images_are_not_mixed_with_fashion_mnist():
    assert input_pipeline.read(Data(), SET).test is None
    with pytest.raises(DataError, match="^test=... is given without train=...; give both"):
        input_pipeline.read(Data(), None, SET)
    with pytest.raises(DataError, match="^validation=... is given without train=...; give both"):
        input_pipeline.read(Data(), validation=SET)


def test_a_validation_set_of_its_own_is_taken_and_not_beside_a_split():
    train, validation, test = input_pipeline.read(Data(), SET, validation=(IMAGES[:2], LABELS[:2]))
    assert len(train) == 6 and len(validation) == 2 and test is None
    with pytest.raises(DataError, match="^validation labels hold -1"):
        input_pipeline.read(Data(), SET, validation=(IMAGES, LABELS - 1))
    with pytest.raises(DataError, match="is a validation set of its own; set data.validation=0"):
        input_pipeline.read(Data(validation=0.5), SET, validation=SET)


def test_sets_of_two_sizes_need_a_common_one():
    other = (IMAGES[:, :, 1:], LABELS)
    sets = input_pipeline.read(Data(), SET, other)
    with pytest.raises(DataError, match=r"training images are \(4, 5\), test images \(4, 4\)"):
        input_pipeline.check_shapes(sets, Data())
    input_pipeline.check_shapes(sets, Data(image_size=4))


def test_a_run_on_arrays_is_not_taken_for_one_on_fashion_mnist():
    assert classes.names(Data(dataset="arrays"), None, 2) == ["0", "1"]
    assert classes.names(Data(), None, 11)[8:] == ["bag", "ankle boot", "10"]
    with pytest.raises(DataError, match="given to fit"):
        input_pipeline.read(Data(dataset="arrays"))


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_training_goes_by_the_seed(seed):
    train = input_pipeline.read(Data(), (PIXELS, LABELS), None).train
    config = from_dict({"seed": seed, "train": {"global_batch_size": 6}})
    (batch,) = input_pipeline.train_loader(train, config, mx.cpu()).from_step(0, 1)
    assert batch.label.asnumpy().tolist() == sharding.epoch_order(6, seed, 0).tolist()
    assert sharding.epoch_order(6, 1, 0).tolist() != sharding.epoch_order(6, 2, 0).tolist()

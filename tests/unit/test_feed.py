"""The user's own arrays: what is taken, and what is refused before anything starts."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest

from trainer import fashion_mnist, feed
from trainer.config import Data
from trainer.fashion_mnist import DataError

IMAGES = np.zeros((6, 4, 5), np.uint8)
LABELS = np.arange(6)
SET = (IMAGES, LABELS)


def test_given_sets_are_taken_as_they_are():
    train, test = feed.read(Data(dataset="idx", folder="/nonexistent"), SET, SET)
    assert train[0] is IMAGES and test[1] is LABELS


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (IMAGES, "train is a ndarray; it must be (images, labels)"),
        ((IMAGES / 255, LABELS), "train images are float64 (6, 4, 5); they must be uint8"),
        ((IMAGES[:, None], LABELS), "(6, 1, 4, 5); they must be uint8 (N, height, width)"),
        ((IMAGES[:, None], LABELS), ".transpose(0, 2, 3, 1) brings channels to the end"),
        ((IMAGES[:, :0], LABELS), "train images are uint8 (6, 0, 5); they must be"),
        ((IMAGES.tolist(), LABELS), "train images are a list; they must be a NumPy array"),
        ((mx.nd.array(IMAGES), LABELS), "an MXNet array gives one by .asnumpy()"),
        ((IMAGES, LABELS.astype(np.float32)), "train labels are float32 (6,)"),
        ((IMAGES, LABELS[:5]), "one for each of the 6 images"),
        ((IMAGES, np.eye(6, dtype=int)), "train labels are int64 (6, 6)"),
        ((IMAGES[:0], LABELS[:0]), "one for each of the 0 images"),
        ((IMAGES, LABELS - 1), "train labels hold -1; classes are numbered from 0"),
    ],
)
def test_what_is_no_such_set_is_told_in_a_line(given, expected):
    with pytest.raises(DataError) as raised:
        feed.read(Data(), given, SET)
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def test_the_test_set_is_looked_at_too():
    with pytest.raises(DataError, match="test labels hold -1"):
        feed.read(Data(), SET, (IMAGES, LABELS - 1))


@pytest.mark.parametrize("sets", [(SET, None), (None, SET)])
def test_own_images_are_not_mixed_with_fashion_mnist(sets):
    with pytest.raises(DataError, match="give both"):
        feed.read(Data(), *sets)


def test_sets_of_two_sizes_need_a_common_one():
    other = (IMAGES[:, :, 1:], LABELS)
    with pytest.raises(DataError, match=r"training images are \(4, 5\), test images \(4, 4\)"):
        feed.read(Data(), SET, other)
    assert feed.read(Data(image_size=4), SET, other)[1] is other


def test_both_sets_have_the_same_channels():
    red_green_blue = (np.zeros((6, 4, 5, 3), np.uint8), LABELS)
    assert feed.read(Data(), red_green_blue, red_green_blue)[0] is red_green_blue
    with pytest.raises(DataError, match=r"images are \(6, 4, 5, 3\), test images \(6, 4, 5\); "):
        feed.read(Data(), red_green_blue, SET)


def test_a_run_on_arrays_is_not_taken_for_one_on_fashion_mnist():
    assert fashion_mnist.class_names("arrays", 2) == ["0", "1"]
    assert fashion_mnist.class_names("fashion_mnist_sample", 11)[8:] == ["bag", "ankle boot", "10"]
    with pytest.raises(DataError, match="given to fit"):
        feed.read(Data(dataset="arrays"))

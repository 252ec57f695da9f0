"""TrivialAugment's operations, against NumPy, on grey and on colour."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.transformed import Transform
from trainer.config import Data
from trainer.data.augment import trivial
from trainer.data.idx_file import DataError

NAMES = [
    "identity",
    "auto_contrast",
    "equalize",
    "posterize",
    "solarize",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "brightness",
    "contrast",
    "sharpness",
    "color",
]
RANDOM = np.random.RandomState(0)
GREY = RANDOM.randint(30, 200, (16, 16), np.uint8)
COLOUR = RANDOM.randint(30, 200, (16, 16, 3), np.uint8)


def made(name: str, image: np.ndarray, strength: float, negative: bool = False) -> np.ndarray:
    draw = [(NAMES.index(name) + 0.5) / len(NAMES), (30 * strength + 0.5) / 31, 0.7 * negative]
    return trivial.augmented(image, np.array(draw)).astype(int)


def luma(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 2 else image @ (0.299, 0.587, 0.114)


def blended(image: np.ndarray, other: Any, factor: float) -> np.ndarray:
    return np.clip(other + factor * (image.astype(float) - other), 0, 255)


def equalized(channel: np.ndarray) -> np.ndarray:
    """By the sum of the histogram below each level, in steps of an equal number of pixels."""
    counts = np.bincount(channel.ravel(), minlength=256)
    step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
    below = np.cumsum(counts) - counts
    return np.minimum((step // 2 + below) // step, 255)[channel] if step else channel


@pytest.mark.parametrize("image", [GREY, COLOUR], ids=["grey", "colour"])
def test_operations_are_those_that_numpy_computes(image: np.ndarray) -> None:
    whole = image.astype(int)
    assert (made("identity", image, 1.0) == whole).all()
    assert (made("posterize", image, 0.5) == whole & 0b11111000).all()
    assert (made("posterize", image, 1.0) == whole & 0b11000000).all()
    assert (made("solarize", image, 0.6) == np.where(whole < 102, whole, 255 - whole)).all()
    low, high = whole.min(axis=(0, 1)), whole.max(axis=(0, 1))
    stretched = np.floor((whole - low) * 255 / (high - low))
    assert abs(made("auto_contrast", image, 0.0) - stretched).max() <= 1
    assert (made("rotate", image, 2 / 3) == np.rot90(whole)).all()
    assert (made("rotate", image, 2 / 3, True) == np.rot90(whole, -1)).all()
    right, down = np.zeros_like(whole), np.zeros_like(whole)
    right[:, 4:], down[8:] = whole[:, :-4], whole[:-8]
    assert (made("translate_x", image, 0.5, True) == right).all()
    assert (made("translate_y", image, 1.0, True) == down).all()  # 8 pixels: half of the side
    for negative in (False, True):
        factor = 1 + 0.99 * 0.5 * (-1 if negative else 1)
        grey = luma(whole)[..., None] if image.ndim == 3 else whole
        for name, other in (
            ("brightness", 0),
            ("contrast", np.rint(luma(whole).mean())),
            ("color", grey),
        ):
            found = made(name, image, 0.5, negative)
            assert abs(found - blended(image, other, factor)).max() <= 2, name


def test_equalize_spreads_the_levels() -> None:
    image = RANDOM.randint(30, 200, (64, 64), np.uint8)
    assert (made("equalize", image, 0.0) == equalized(image)).all()


def test_sharpness_is_away_from_the_smoothed_image() -> None:
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    windows = np.lib.stride_tricks.sliding_window_view(GREY.astype(float), (3, 3))
    smooth = (windows * kernel).sum(axis=(2, 3))
    found = made("sharpness", GREY, 1.0)[1:-1, 1:-1]
    assert abs(found - blended(GREY[1:-1, 1:-1], smooth, 1.99)).max() <= 2


@pytest.mark.parametrize("name, axis", [("shear_x", 1), ("shear_y", 0)])
def test_shear_moves_each_line_further(name: str, axis: int) -> None:
    found = made(name, GREY, 1.0)
    lines, expected = (np.moveaxis(i.astype(int), axis, 1) for i in (found, np.zeros_like(GREY)))
    whole = np.moveaxis(GREY.astype(int), axis, 1)
    for row in range(16):
        for column in range(16):
            source = int(np.floor(column + 0.5 + 0.99 * (row + 0.5)))
            expected[row, column] = whole[row, source] if source < 16 else 0
    assert (lines == expected).all()


def test_each_sample_draws_its_own_whichever_batch_it_is_in() -> None:
    images = RANDOM.randint(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    transform = Transform(images, Data(trivial_augment=True, flip=True), 3, training=True)
    whole = transform(np.arange(40), 1)
    alone = np.concatenate([transform(np.array([i]), 1) for i in range(39, -1, -1)])[::-1]
    np.testing.assert_array_equal(whole, alone)
    assert abs(whole - transform(np.arange(40), 2)).max(axis=(1, 2, 3)).astype(bool).sum() > 30
    plain = Transform(images, Data(flip=True), 3, training=True)(np.arange(40), 1)
    assert (abs(whole - plain).max(axis=(1, 2, 3)) > 0).sum() > 30
    test = Transform(images, Data(trivial_augment=True), 3, training=False)(np.arange(40))
    np.testing.assert_array_equal(test, Transform(images, Data(), 3, False)(np.arange(40)))


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(DataError, match="these have 4 channels"):
        Transform(np.zeros((1, 4, 4, 4), np.uint8), Data(trivial_augment=True), 0, True)

"""The training and the test set, and this rank's share of them, put on its device."""

from __future__ import annotations

from typing import Optional, Tuple

import mxnet as mx
import numpy as np

from . import dist, fashion_mnist
from .config import Config, Data
from .fashion_mnist import DataError
from .loader import EvalLoader, TrainLoader
from .placement import on_device

Arrays = Tuple[np.ndarray, np.ndarray]  # images uint8 (N, H, W[, C]), labels integer (N,)

# More are not known of any picture; a set with its channels first would seem to have them.
MAX_CHANNELS = 4


def read(
    settings: Data, train: Optional[Arrays] = None, test: Optional[Arrays] = None
) -> Tuple[Arrays, Arrays]:
    """The training and the test set: the given ones, else those that ``settings`` name.

    Raises:
        DataError: they cannot be had, are no such arrays, or differ in the size of their images.
    """
    if train is None and test is None:
        source = (settings.folder, settings.dataset)
        train, test = fashion_mnist.load("train", *source), fashion_mnist.load("test", *source)
    elif train is None or test is None:
        raise DataError("give both train=(images, labels) and test=(images, labels), or neither")
    else:
        _check("train", train)
        _check("test", test)
    sizes = train[0].shape[1:3], test[0].shape[1:3]
    if sizes[0] != sizes[1] and settings.image_size is None:
        raise DataError(
            f"training images are {sizes[0]}, test images {sizes[1]} (height, width); set "
            "data.image_size"
        )
    if train[0].shape[3:] != test[0].shape[3:]:
        raise DataError(
            f"training images are {train[0].shape}, test images {test[0].shape}; they must have "
            "the same channels: (N, height, width, channels), or (N, height, width) of one"
        )
    return train, test


def _check(name: str, given: Arrays) -> None:
    """Refuse what training would stumble over later, or take for something else."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise DataError(f"{name} is a {type(given).__name__}; it must be (images, labels)")
    for what, array in zip(("images", "labels"), given):
        if not isinstance(array, np.ndarray):
            raise DataError(
                f"{name} {what} are a {type(array).__name__}; they must be a NumPy array "
                "(an MXNet array gives one by .asnumpy())"
            )
    images, labels = given
    shaped = images.ndim == 3 or (images.ndim == 4 and images.shape[3] <= MAX_CHANNELS)
    if images.dtype != np.uint8 or not shaped or 0 in images.shape[1:]:
        raise DataError(
            f"{name} images are {images.dtype} {images.shape}; they must be uint8 (N, height, "
            f"width), or (N, height, width, channels) of up to {MAX_CHANNELS} channels, 0 to 255 "
            "(.transpose(0, 2, 3, 1) brings channels to the end)"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or not labels.size:
        raise DataError(
            f"{name} labels are {labels.dtype} {labels.shape}; they must be whole numbers, one "
            f"for each of the {len(images)} images: labels.astype(int)"
        )
    if labels.min() < 0:
        raise DataError(f"{name} labels hold {labels.min()}; classes are numbered from 0")


def train_loader(train: Arrays, config: Config, ctx: mx.Context) -> TrainLoader:
    """Its share of every global batch."""
    return TrainLoader(
        *train,
        config.data,
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
        rank=dist.rank(),
        world_size=dist.world_size(),
        place=on_device(ctx),
    )


def test_loader(test: Arrays, config: Config, ctx: mx.Context) -> EvalLoader:
    """Its share of the test set."""
    return EvalLoader(
        *test,
        config.data,
        batch_size=config.evaluate.batch_size,
        rank=dist.rank(),
        world_size=dist.world_size(),
        place=on_device(ctx),
    )

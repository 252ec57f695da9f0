"""From settings to the training and test set, and to this rank's loaders of them."""

from __future__ import annotations

from typing import Any, Tuple

import mxnet as mx

from .. import dist
from ..config import Config, Data
from ..dist.array_memory import on_device
from . import arrays, fashion_mnist
from .arrays import Arrays
from .idx_file import DataError
from .loader import EvalLoader, TrainLoader


def read(settings: Data, train: Any = None, test: Any = None) -> Tuple[Arrays, Arrays]:
    """The training and the test set: the given ones, or those that ``settings`` name.

    Args:
        train, test: arrays or a dataset, see :func:`arrays.checked`.

    Raises:
        DataError: they cannot be found or are invalid, or their images differ in size or channels.
    """
    if train is None and test is None:
        source = (settings.folder, settings.dataset)
        train, test = fashion_mnist.load("train", *source), fashion_mnist.load("test", *source)
    elif train is None or test is None:
        raise DataError("give both train=(images, labels) and test=(images, labels), or neither")
    else:
        train, test = arrays.checked("train", train), arrays.checked("test", test)
    sizes = [images.shape[1:3] for images, _ in (train, test)]
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


def image_size(settings: Data) -> Tuple[int, int]:
    """(height, width) of the images that ``settings`` name, before any resizing."""
    if settings.dataset != "idx":
        return fashion_mnist.IMAGE_SIZE
    height, width = fashion_mnist.load("test", settings.folder, settings.dataset)[0].shape[1:]
    return height, width


def train_loader(train: Arrays, config: Config, ctx: mx.Context) -> TrainLoader:
    """This rank's loader of training batches."""
    return TrainLoader(
        *train,
        config.data,
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
        rank=dist.rank(),
        world_size=dist.world_size(),
        parts=config.optimizer.accumulate,
        place=on_device(ctx),
    )


def test_loader(test: Arrays, config: Config, ctx: mx.Context) -> EvalLoader:
    """This rank's loader of the test set."""
    return EvalLoader(
        *test,
        config.data,
        batch_size=config.evaluate.batch_size,
        rank=dist.rank(),
        world_size=dist.world_size(),
        place=on_device(ctx),
    )

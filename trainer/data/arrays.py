"""Validates the images and labels that a user passes to ``fit``, before anything is started."""

from __future__ import annotations

from typing import Any, List, Tuple

import mxnet as mx
import numpy as np
from mxnet import gluon

from .idx_file import DataError

# Images, uint8 (N, H, W[, C]); labels, integer (N,).
Arrays = Tuple[np.ndarray, np.ndarray]

_MOST_CHANNELS = 4  # a longer last axis is not taken for channels


def checked(name: str, given: Any) -> Arrays:
    """``given``, a pair of arrays or a Gluon dataset, as arrays.

    Args:
        name: ``train`` or ``test``, for messages.

    Raises:
        DataError: a type, shape or dtype that training cannot use.
    """
    if isinstance(given, gluon.data.Dataset):
        given = _read(name, given)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        loads = isinstance(given, (gluon.data.DataLoader, mx.io.DataIter))
        raise DataError(
            f"{name} is a {type(given).__name__}; it must be (images, labels) as NumPy arrays, or "
            "a Gluon dataset"
            + (": give what it reads, as fit makes batches and shards itself" if loads else "")
        )
    for what, array in zip(("images", "labels"), given):
        if not isinstance(array, np.ndarray):
            raise DataError(
                f"{name} {what} are a {type(array).__name__}; they must be a NumPy array "
                "(an MXNet array gives one by .asnumpy())"
            )
    images, labels = given
    _check_images(name, images)
    _check_labels(name, labels, len(images))
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    return images, labels


def _read(name: str, dataset: gluon.data.Dataset) -> Arrays:
    """Read all samples of a Gluon dataset of (image, label) into memory."""
    images: List[np.ndarray] = []
    labels: List[np.ndarray] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise DataError(
                f"{name}[{index}] is a {type(sample).__name__}; a dataset must give (image, label)"
            )
        image, label = (_on_host(part) for part in sample)
        if images and image.shape != images[0].shape:
            raise DataError(
                f"{name}[{index}] has an image of {image.shape}, those before are "
                f"{images[0].shape}; make them alike, by dataset.transform_first"
            )
        images.append(image)
        labels.append(label.reshape(()) if label.size == 1 else label)
    classes = np.array(labels)
    # Image records store labels as floats.
    if classes.dtype.kind == "f" and (classes == np.rint(classes)).all():
        classes = classes.astype(np.int64)
    return np.array(images), classes


def _on_host(value: Any) -> np.ndarray:
    return value.asnumpy() if isinstance(value, mx.nd.NDArray) else np.asarray(value)


def _check_images(name: str, images: np.ndarray) -> None:
    if not len(images):
        raise DataError(f"{name} holds no image")
    shape = images.shape
    shaped = images.ndim == 3 or (images.ndim == 4 and shape[-1] <= _MOST_CHANNELS)
    if images.dtype == np.uint8 and shaped and 0 not in shape:
        return
    way_out = ""
    if images.dtype.kind == "f":
        way_out = "; fit scales them itself (data.mean, data.std): leave ToTensor out, or " + (
            "(images * 255).astype('uint8')" if np.nanmax(images) <= 1 else "images.astype('uint8')"
        )
    elif images.ndim == 4 and shape[1] <= _MOST_CHANNELS:
        way_out = ": images.transpose(0, 2, 3, 1)"
    raise DataError(
        f"{name} images are {images.dtype} {shape}; they must be uint8 (N, height, width), or "
        f"(N, height, width, channels) of up to {_MOST_CHANNELS} channels, 0 to 255{way_out}"
    )


def _check_labels(name: str, labels: np.ndarray, count: int) -> None:
    way_out = "labels.astype(int)"
    if labels.ndim == 2 and len(labels) == count:
        way_out = "labels.ravel()" if labels.shape[1] == 1 else "labels.argmax(axis=1)"
    elif labels.shape != (count,):
        way_out = f"give {count}"
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(
            f"{name} labels are {labels.dtype} {labels.shape}; they must be the class of each of "
            f"the {count} images, a whole number: {way_out}"
        )
    if labels.min() < 0:
        raise DataError(f"{name} labels hold {labels.min()}; classes are numbered from 0")

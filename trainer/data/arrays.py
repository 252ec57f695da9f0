"""The arrays or datasets that a user passes to ``fit``, validated before anything is started."""

from __future__ import annotations

from typing import Any, List, Tuple, Union

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import console, mxnet_internals
from ..config import Data
from .idx_file import DataError
from .sources.dataset import DatasetSource, no_image, no_pair, on_host

# Images, uint8 (N, H, W[, C]); labels, integers or texts (N,).
Arrays = Tuple[np.ndarray, np.ndarray]

# A Gluon dataset, or any other object with a length and samples (image, label) at indices.
Samples = Any

_IN_MEMORY = (list, tuple, np.ndarray, mx.nd.NDArray)
_NO_DATASET = (*_IN_MEMORY, dict, str, gluon.data.DataLoader)  # though they have a length
_CORNER = 32  # of 255: a set whose pixels span no more is told of


def given(name: str, value: Any, settings: Data) -> Union[Arrays, DatasetSource]:
    """``value``, a pair of arrays or a dataset, as arrays or as a source that reads it.

    DataError says of ``name``, train or test, which type, shape or dtype training cannot use.
    """
    if isinstance(value, list) and value and not any(map(no_pair, value)):
        value = gluon.data.SimpleDataset(value)  # of samples
    indexed = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    parts = mxnet_internals.stored_parts(value)
    if parts is not None and all(isinstance(part, _IN_MEMORY) for part in parts):
        value = _read(name, value)  # without transforms, so that reading it is final
    elif indexed and not isinstance(value, _NO_DATASET):
        return DatasetSource(name, value, settings)
    if no_pair(value):
        loads = isinstance(value, (gluon.data.DataLoader, mx.io.DataIter))
        raise DataError(
            f"{name} is a {type(value).__name__}; it must be (images, labels) as NumPy arrays, or "
            "a dataset: Gluon's, or any object with __len__ and __getitem__"
            + (": give what it reads, as fit makes batches and shards itself" if loads else "")
        )
    for what, array in zip(("images", "labels"), value):
        if not isinstance(array, (np.ndarray, mx.nd.NDArray)):
            raise DataError(
                f"{name} {what} are a {type(array).__name__}; they must be a NumPy or MXNet array: "
                f"np.asarray({what})"
            )
    images, labels = map(on_host, value)
    if isinstance(value[1], mx.nd.NDArray):
        labels = _whole(labels)
    if not len(images):
        raise DataError(f"{name} holds no image")
    if wrong := no_image(images[0]):
        raise DataError(f"{name} images are {images.dtype} {images.shape}; each {wrong}")
    labels = _check_labels(name, labels, len(images))
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    return images, labels


def _read(name: str, dataset: gluon.data.Dataset) -> Arrays:
    """All samples of a dataset of (image, label) in memory, as arrays."""
    images: List[np.ndarray] = []
    labels: List[np.ndarray] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        if wrong := no_pair(sample):
            raise DataError(f"{name}[{index}] {wrong}")
        image, label = (on_host(part) for part in sample)
        if images and image.shape != images[0].shape:
            raise DataError(
                f"{name}[{index}] has an image of {image.shape}, those before are "
                f"{images[0].shape}; make them alike, by dataset.transform_first"
            )
        images.append(image)
        labels.append(label.reshape(()) if label.size == 1 else label)
    return np.array(images), _whole(np.array(labels))


def _whole(labels: np.ndarray) -> np.ndarray:
    """Whole numbers as int64: MXNet's arrays and image records hold labels as floats."""
    whole = labels.dtype.kind == "f" and (labels == np.rint(labels)).all()
    return labels.astype(np.int64) if whole else labels


def tell_of_range(name: str, images: np.ndarray) -> None:
    """Warn of uint8 pixels that look as if they were scaled before they were made so."""
    held = np.zeros(256, bool)
    for image in images:  # NumPy counts bytes as eight bytes each, so never all at once
        held |= np.bincount(image.ravel(), minlength=256) > 0
    (values,) = np.nonzero(held)
    low, high = int(values[0]), int(values[-1])
    inner = values[(values > 0) & (values < 255)]
    if high - low < _CORNER:
        hold = f"hold {low} to {high} only"
    elif len(inner) and ((inner <= _CORNER) | (inner >= 255 - _CORNER)).all():
        hold = "hold numbers near 0 and near 255 only, as wrapped negative ones are"
    else:
        return
    console.warn(
        f"{name} images {hold}, and fit takes 0 to 255: were they scaled before astype('uint8')? "
        "If they are right, set data.mean and data.std to theirs, divided by 255"
    )


def _check_labels(name: str, labels: np.ndarray, count: int) -> np.ndarray:
    if labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels.ravel()):
        labels = labels.astype(str)
    way_out = f"labels.astype({'str' if labels.dtype.kind == 'S' else 'int'})"
    if labels.ndim == 2 and len(labels) == count:
        way_out = "labels.ravel()" if labels.shape[1] == 1 else "labels.argmax(axis=1)"
    elif labels.shape != (count,):
        way_out = f"give {count}"
    if labels.dtype.kind not in "iuU" or labels.shape != (count,):
        raise DataError(
            f"{name} labels are {labels.dtype} {labels.shape}; they must be the class of each of "
            f"the {count} images, a whole number or a text: {way_out}"
        )
    if labels.dtype.kind != "U" and labels.min() < 0:
        raise DataError(f"{name} labels hold {labels.min()}; classes are numbered from 0")
    return labels

"""Numbers for classes: labels that begin at 1, or are words, and the names of classes."""

from __future__ import annotations

from pathlib import Path
from typing import List, Optional, Tuple, Union

import numpy as np

from ..config import Data
from . import fashion_mnist
from .idx_file import DataError, readable

# What a set itself calls a class: a number other than its index, a folder, a word.
ClassLabel = Union[int, str]
Classes = Optional[Tuple[ClassLabel, ...]]


def of_labels(train: np.ndarray, *others: np.ndarray) -> Classes:
    """What the labels of a set call classes 0, 1, ...; None where they are these numbers.

    Integers or texts, (N,), of the training set, and of the ``others`` beside it.
    """
    if train.dtype.kind == "U":
        return tuple(np.unique(train).tolist())
    numbers = [labels for labels in (train, *others) if labels.dtype.kind != "U"]
    if min(int(labels.min()) for labels in numbers) != 1:  # EMNIST's letters are 1 to 26
        return None
    most = max(int(labels.max()) for labels in numbers)
    return tuple(range(1, most + 1))


def numbered(name: str, labels: np.ndarray, classes: Classes) -> np.ndarray:
    """``labels`` as indices of ``classes``, int64 (N,); as they are where ``classes`` is None.

    DataError names the first that is none of them.
    """
    if classes is None:
        if labels.dtype.kind == "U":
            raise DataError(f"{name} labels are texts, and those of the training set numbers")
        return labels
    known = np.array(classes)
    if (known.dtype.kind == "U") != (labels.dtype.kind == "U"):
        raise DataError(f"{name} labels are {labels.dtype}, and those of the training set are not")
    order = np.argsort(known)
    places = np.minimum(np.searchsorted(known, labels, sorter=order), len(known) - 1)
    found = order[places]
    wrong = np.flatnonzero(known[found] != labels)
    if len(wrong):
        raise DataError(
            f"{name} label {wrong[0]} is {labels[wrong[0]]!r}, which the training set has not: it "
            f"has {known[0]} to {known[-1]}"
        )
    return found.astype(np.int64)


def names(settings: Data, classes: Classes, num_classes: int) -> List[str]:
    """A name for each score: from ``data.class_names``, or from the set, or its number.

    A score that no class of the set has is ``score N``: a number may be a label of the set. Raises
    DataError where the file cannot be read, or does not name each class of the set once.
    """
    if settings.class_names is not None:
        named = _read(Path(settings.class_names).expanduser(), classes, num_classes)
    elif classes is not None:
        named = list(map(str, classes))
    else:
        known = fashion_mnist.CLASS_NAMES if settings.dataset.startswith("fashion_mnist") else ()
        return [*known, *map(str, range(len(known), num_classes))]
    return [*named, *(f"score {number}" for number in range(len(named), num_classes))]


def _read(path: Path, classes: Classes, num_classes: int) -> List[str]:
    try:
        with readable(f"data.class_names is {path}, which"):
            lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"data.class_names is {path}, which is not UTF-8") from None
    found = [line.strip() for line in lines if line.strip()]
    if len(set(found)) < len(found) or not found:
        raise DataError(f"data.class_names is {path}; it must name each class in a line, once")
    if len(found) > num_classes or (classes is not None and len(found) != len(classes)):
        has = f"net has {num_classes} scores" if classes is None else f"set has {len(classes)}"
        raise DataError(f"data.class_names is {path}, which names {len(found)} classes; the {has}")
    return found

"""The interface between the loader and a set of samples, and the set that is in memory."""

from __future__ import annotations

import abc
import hashlib
from dataclasses import dataclass
from typing import Any, Dict, Iterable, Optional, Sequence, Tuple, Type

import numpy as np

from ...config import Data
from ..classes import Classes
from ..idx_file import BadSampleError
from ..transform import planes
from .filler import Filler

_DIGESTED = 1 << 28  # bytes of images that a digest reads at most


class Source(abc.ABC):
    """A set of labelled images."""

    #: The class of each sample, int64 (N,); None where only reading a sample tells it.
    labels: Optional[np.ndarray] = None
    #: What the set calls classes 0, 1, ...; None where it uses these numbers.
    classes: Classes = None
    #: Scores of the net; None until :meth:`expect` tells. Labels that are read are held to it.
    num_classes: Optional[int] = None
    #: What figures on it are said to be of.
    called: str = "test"
    #: What makes its batches.
    batches: Type[Filler]
    #: The bad samples that this rank has found, and skipped.
    skipped: Iterable[int] = ()

    @property
    @abc.abstractmethod
    def image_shape(self) -> Tuple[int, ...]:
        """(height, width) or (height, width, channels) of what the pixel transforms take."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of samples."""

    def filler(self, settings: Data, seed: int, training: bool) -> Filler:
        """What makes batches; augmented from ``seed`` if ``training``."""
        return self.batches(self, settings, seed, training)

    @abc.abstractmethod
    def subset(self, indices: np.ndarray) -> Source:
        """The samples ``indices``, in this order."""

    @abc.abstractmethod
    def images_digest(self) -> str:
        """Equal for equal images. Of a large set it covers the listing, and some of them."""

    def digests(self) -> Dict[str, str]:
        """Digests of the ``images`` and, where they are known, the ``labels``."""
        found = {"images": self.images_digest()}
        if self.labels is not None:
            found["labels"] = digest_of(repr(self.classes), self.labels.astype(np.int64))
        return found

    def all_labels(self) -> Optional[np.ndarray]:
        """``labels``, read from every sample if that is cheap; None where it is not."""
        return self.labels

    def expect(self, num_classes: int) -> None:
        """Tell the scores of the net: a sample of another class is a bad one from now on."""
        self.num_classes = num_classes

    def close(self) -> None:  # noqa: B027 (most have nothing to stop)
        """Stop threads and processes; they start again when needed."""


class _ArrayFiller(Filler):
    def __call__(
        self, rows: np.ndarray, epoch: int, data: np.ndarray, label: np.ndarray
    ) -> Sequence[int]:
        self._pixels(planes(self._source.images)[rows], rows, epoch, data)
        label[:] = self._source.labels[rows]
        return ()


@dataclass(eq=False)
class ArraySource(Source):
    """Images in memory."""

    images: np.ndarray  # uint8 (N, H, W), or (N, H, W, C) of C channels; kept, not copied
    labels: np.ndarray  # integer (N,), from 0
    classes: Classes = None

    batches = _ArrayFiller

    @property
    def image_shape(self) -> Tuple[int, ...]:
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> Source:
        """A copy of some samples."""
        return ArraySource(self.images[indices], self.labels[indices], self.classes)

    def images_digest(self) -> str:
        """Of all images or, of a large set, some."""
        every = max(1, self.images.nbytes // _DIGESTED)
        return digest_of(str(self.images.shape), np.ascontiguousarray(self.images[::every]))


def digest_of(*parts: Any) -> str:
    """Of texts and contiguous arrays."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        content = memoryview(content).cast("B")
        found.update(len(content).to_bytes(8, "little"))
        found.update(content)
    return found.hexdigest()


def probes(size: int, most: int = 16) -> np.ndarray:
    """Indices of a few samples of a set on disk, spread evenly, that are read at the start."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).astype(int))


def check_label(value: Any, num_classes: Optional[int], name: str, classes: Classes = None) -> int:
    """``value``, one of ``classes`` where there are any, as a class.

    Raises BadSampleError where it is none of them, no whole number from 0, or no class of the net.
    """
    number = np.asarray(value).reshape(-1)
    if classes is not None:
        if len(number) == 1 and number.tolist()[0] in classes:
            return classes.index(number.tolist()[0])
        raise BadSampleError(
            f"{name} has the label {value}; those of the training set are {classes[0]} to "
            f"{classes[-1]}"
        )
    label = float(number[0]) if len(number) == 1 and number.dtype.kind in "iufb" else -1.0
    known = num_classes is None or label < num_classes
    if label < 0 or not label.is_integer() or not known:
        allowed = "up" if num_classes is None else f"to {num_classes - 1}"
        raise BadSampleError(
            f"{name} has the label {value}; it must be a whole number from 0 {allowed}: mend it, "
            "or the number of the net's scores, or set data.bad_samples=skip"
        )
    return int(label)

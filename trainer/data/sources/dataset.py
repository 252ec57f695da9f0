"""A Gluon dataset, or any object with a length and indices, read sample by sample when needed.

It is read by processes of its own (forked, so that it need not be pickled). There its transforms
draw from generators that nobody else uses: Python's, NumPy's and MXNet's are seeded before each
sample from (seed, epoch, sample). What is drawn depends on nothing else, and the user's own
generators stay as they were.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import mxnet as mx
import numpy as np

from ...config import Data
from ...errors import describe_error
from .. import sharding
from ..idx_file import BadSampleError, DataError
from ..pictures.batches import Skipped, threads
from ..randomness import seed_all
from ..transform import PixelTransform, planes, planes_shape
from .base import Source, check_label, digest_of, probes
from .filler import Filler

_MOST_CHANNELS = 4  # a longer last axis is not taken for channels


class _Sample(NamedTuple):
    image: np.ndarray
    label: Any


class _Failed(NamedTuple):
    message: str


_Answer = Union[_Sample, _Failed]


class DatasetSource(Source):
    """Samples of a dataset of (image, label), uint8 (H, W) or (H, W, C) after its transforms.

    Args:
        name: ``train`` or ``test``, for messages.
        settings: how many processes read it.
        indices: the samples; None for all of them.
    """

    def __init__(
        self, name: str, dataset: Any, settings: Data, indices: Optional[np.ndarray] = None
    ):
        self._name, self._dataset, self._settings = name, dataset, settings
        self._indices = np.arange(len(dataset)) if indices is None else indices
        if not len(self._indices):
            raise DataError(f"{name} holds no image")
        self._readers: Optional[_Readers] = None
        self._shape: Optional[Tuple[int, ...]] = None
        self.skipped = Skipped()

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def image_shape(self) -> Tuple[int, ...]:
        """The shape of the first sample; all must have it."""
        if self._shape is None:
            self._shape = self.samples([0], 0, 0)[0].image.shape
        return self._shape

    def name(self, index: int) -> str:
        """As Python writes it: ``train[17]``."""
        return f"{self._name}[{self._indices[index]}]"

    def samples(self, rows: Sequence[int], seed: int, epoch: int) -> List[_Sample]:
        """The samples ``rows``, as they are drawn from (seed, epoch).

        Raises:
            BadSampleError: the first that cannot be used.
        """
        found = self.try_samples(rows, seed, epoch)
        for sample in found:
            if isinstance(sample, BadSampleError):
                raise sample
        return [sample for sample in found if isinstance(sample, _Sample)]

    def try_samples(
        self, rows: Sequence[int], seed: int, epoch: int
    ) -> List[Union[_Sample, BadSampleError]]:
        """The samples ``rows``, or why they cannot be used."""
        if self._readers is None:
            self._readers = _Readers(self._dataset, max(1, threads(self._settings)))
        seeds = (sharding.uniform(seed, epoch, np.asarray(rows), 1)[:, 0] * 2**31).astype(int)
        answers = self._readers.read([(int(self._indices[r]), int(s)) for r, s in zip(rows, seeds)])
        return [self._checked(row, answer) for row, answer in zip(rows, answers)]

    def filler(self, settings: Data, seed: int, training: bool) -> Filler:
        """See :class:`Source`."""
        return _DatasetBatches(self, settings, seed, training)

    def subset(self, indices: np.ndarray) -> DatasetSource:
        """See :class:`Source`."""
        chosen = self._indices[indices]
        return DatasetSource(self._name, self._dataset, self._settings, chosen)

    def images_digest(self) -> str:
        """Of the length, and of a few samples."""
        parts: List[Any] = [str(len(self)), self._indices.astype(np.int64)]
        for sample in self.try_samples(probes(len(self)), 0, 0):
            if isinstance(sample, _Sample):
                parts += [repr(sample.label), np.ascontiguousarray(sample.image)]
        return digest_of(*parts)

    def close(self) -> None:
        """End the processes."""
        readers, self._readers = self._readers, None
        if readers is not None:
            readers.close()

    def _checked(self, row: int, answer: _Answer) -> Union[_Sample, BadSampleError]:
        name = self.name(row)
        if isinstance(answer, _Failed):
            return BadSampleError(f"{name} {answer.message}")
        image = answer.image
        shaped = image.ndim == 2 or (image.ndim == 3 and image.shape[-1] <= _MOST_CHANNELS)
        if image.dtype != np.uint8 or not shaped or 0 in image.shape:
            way_out = (
                "; fit scales them itself (data.mean, data.std): leave ToTensor and Normalize out"
                if image.dtype.kind == "f"
                else ""
            )
            return BadSampleError(
                f"{name} has an image of {image.dtype} {image.shape}; it must be uint8 (height, "
                f"width), or (height, width, channels) of up to {_MOST_CHANNELS} channels{way_out}"
            )
        if image.shape[2:] == (1,):
            image = image[..., 0]
        if self._shape is not None and image.shape != self._shape:
            return BadSampleError(
                f"{name} has an image of {image.shape}, the first one is {self._shape}; make them "
                "alike, by dataset.transform_first"
            )
        try:
            return _Sample(image, check_label(answer.label, self.num_classes, name))
        except BadSampleError as error:
            return error


class _DatasetBatches(Filler):
    def __init__(self, source: DatasetSource, settings: Data, seed: int, training: bool):
        self._source, self._seed, self._training = source, seed, training
        shape = planes_shape(source.image_shape)
        self._pixels = PixelTransform(shape, settings, seed, training)
        self._skips = settings.bad_samples == "skip"
        self.shape = self._pixels.shape

    def __call__(
        self, rows: np.ndarray, epoch: int, data: np.ndarray, label: np.ndarray
    ) -> Sequence[int]:
        found = self._source.try_samples(rows.tolist(), self._seed, epoch)
        bad = [place for place, sample in enumerate(found) if isinstance(sample, BadSampleError)]
        pixels = np.zeros((len(rows), *self._source.image_shape), np.uint8)
        for place, sample in enumerate(found):
            good = (
                self._instead(int(rows[place]), epoch, sample)
                if isinstance(sample, BadSampleError)
                else sample
            )
            if good is not None:
                pixels[place], label[place] = good
        self._pixels(planes(pixels), rows, epoch, data)
        return bad

    def _instead(self, row: int, epoch: int, error: BadSampleError) -> Optional[_Sample]:
        """The next good sample after the bad one ``row``, in training; in evaluation nothing."""
        for offset in range(1, Skipped.MOST_IN_A_ROW):
            if not self._skips:
                raise error
            self._source.skipped.tell((row + offset - 1) % len(self._source), error)
            if not self._training:
                return None
            following = (row + offset) % len(self._source)
            (sample,) = self._source.try_samples([following], self._seed, epoch)
            if not isinstance(sample, BadSampleError):
                return sample
            error = sample
        raise Skipped.too_many(self._source.name(row))


class _Readers:
    """Processes that read a dataset. One batch at a time is asked for, and divided among them."""

    def __init__(self, dataset: Any, count: int):
        fork = multiprocessing.get_context("fork")
        self._lock = threading.Lock()
        self._pipes: List[Connection] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=_serve, args=(theirs, dataset), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def read(self, wanted: Sequence[Tuple[int, int]]) -> List[_Answer]:
        """The samples of some (index, seed)."""
        count = len(self._pipes)
        with self._lock:
            try:
                for number, pipe in enumerate(self._pipes):
                    pipe.send(wanted[number::count])
                answers: Dict[int, _Answer] = {}
                for number, pipe in enumerate(self._pipes):
                    answers.update(zip(range(number, len(wanted), count), pipe.recv()))
            except (EOFError, OSError):
                raise DataError(
                    "a process that reads the dataset has died; was it killed, or out of memory? "
                    "fewer data.workers take less"
                ) from None
        return [answers[number] for number in range(len(wanted))]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()


def _serve(pipe: Connection, dataset: Any) -> None:
    """Read the samples that are asked for, until the parent closes the pipe or is gone."""
    for number in (signal.SIGINT, signal.SIGUSR1):  # meant for the rank, which ends this
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send([_read(dataset, index, seed) for index, seed in pipe.recv()])
    os._exit(0)  # not what the parent has registered for its own end


def _read(dataset: Any, index: int, seed: int) -> _Answer:
    seed_all(seed)
    try:
        sample = dataset[index]
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            kind = type(sample).__name__
            return _Failed(f"is a {kind}; a dataset must give (image, label)")
        image, label = (on_host(part) for part in sample)
        return _Sample(image, label)
    except Exception as error:  # a user's dataset and transforms may fail in any way
        return _Failed(f"cannot be read: {describe_error(error)}")
    except BaseException:
        traceback.print_exc()
        return _Failed("cannot be read: its dataset gave up, see above")


def on_host(value: Any) -> np.ndarray:
    """An MXNet array, or anything else, as a NumPy array."""
    return value.asnumpy() if isinstance(value, mx.nd.NDArray) else np.asarray(value)

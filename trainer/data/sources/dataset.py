"""A Gluon dataset, or any object with a length and indices, read sample by sample when needed.

It is read by processes of its own (forked, so that it need not be pickled). There its transforms
draw from generators that nobody else uses: Python's, NumPy's and MXNet's, and those that it holds,
are seeded before each sample from (seed, epoch, sample). What is drawn depends on nothing else, and
the user's own generators stay as they were.

The readers share nothing with the rank, nor with each other, that reading changes: files that the
dataset has open are opened anew. Nor do they see what the rank later does to the dataset.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import multiprocessing
import os
import signal
import stat
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import mxnet as mx
import numpy as np

from ...config import Data
from ...errors import describe_error
from .. import sharding
from ..idx_file import BadSampleError, DataError
from ..randomness import held, seed_all, seed_others
from .base import Source, check_label, digest_of, probes
from .filler import ReadingFiller, Sample, Skipped
from .pictures import threads

MOST_CHANNELS = 4  # a longer last axis is not taken for channels
_FIRST = 100  # samples, of which the first good one has the shape of all
_ALIVE_SECONDS = 1.0  # between two looks of an idle reader at whether its rank is still there

_Answer = Union[Sample, str]  # or what is wrong with it, after its name
_Read = Union[Sample, BadSampleError]


class _DatasetBatches(ReadingFiller):
    def __call__(
        self, rows: np.ndarray, epoch: int, data: np.ndarray, label: np.ndarray
    ) -> Sequence[int]:
        wanted: List[int] = rows.tolist()
        found = dict(zip(wanted, self._source.samples(wanted, self._seed, epoch)))

        def read(position: int, row: int) -> Sample:
            if row not in found:  # it stands in the place of a bad one
                (found[row],) = self._source.samples([row], self._seed, epoch)
            return good(found[row])

        return self._write(rows, epoch, read, data, label)


class DatasetSource(Source):
    """Samples of a dataset of (image, label), uint8 (H, W) or (H, W, C) after its transforms.

    Args:
        name: ``train`` or ``test``, for messages.
        settings: how many processes read it.
        indices: the samples; None for all of them.
    """

    batches = _DatasetBatches

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
        """The shape of the first sample, or the first to be had; all must have it."""
        if self._shape is None:
            skip = self._settings.bad_samples == "skip"
            rows = range(min(len(self), _FIRST) if skip else 1)
            tried = (self.samples([row], 0, 0)[0] for row in rows)
            found = next((s for s in tried if not isinstance(s, BadSampleError)), None)
            self._shape = good(found or self.samples([0], 0, 0)[0])[0].shape
        return self._shape

    def name(self, index: int) -> str:
        """As Python writes it: ``train[17]``."""
        return f"{self._name}[{self._indices[index]}]"

    def samples(self, rows: Sequence[int], seed: int, epoch: int) -> List[_Read]:
        """The samples ``rows``, as they are drawn from (seed, epoch), or why they are none."""
        if self._readers is None:
            self._readers = _Readers(self._dataset, max(1, threads(self._settings)))
        seeds = (sharding.uniform(seed, epoch, np.asarray(rows), 1)[:, 0] * 2**31).astype(int)
        answers = self._readers.read([(int(self._indices[r]), int(s)) for r, s in zip(rows, seeds)])
        return [self._checked(row, answer) for row, answer in zip(rows, answers)]

    def subset(self, indices: np.ndarray) -> DatasetSource:
        chosen = self._indices[indices]
        return DatasetSource(self._name, self._dataset, self._settings, chosen)

    def images_digest(self) -> str:
        """Of the length, and of a few samples as they are drawn in the first epoch."""
        parts: List[Any] = [str(len(self)), self._indices.astype(np.int64)]
        for sample in self.samples(probes(len(self)).tolist(), 0, 0):
            if self._settings.bad_samples == "stop":
                good(sample)
            if not isinstance(sample, BadSampleError):
                parts += [repr(sample[1]), np.ascontiguousarray(sample[0])]
        return digest_of(*parts)

    def close(self) -> None:
        """End the processes."""
        readers, self._readers = self._readers, None
        if readers is not None:
            readers.close()

    def _checked(self, row: int, answer: _Answer) -> _Read:
        name = self.name(row)
        if isinstance(answer, str):
            return BadSampleError(f"{name} {answer}")
        image, label = answer
        if wrong := no_image(image):
            return BadSampleError(f"{name} has an image of {image.dtype} {image.shape}; it {wrong}")
        if image.shape[2:] == (1,):
            image = image[..., 0]
        if self._shape is not None and image.shape != self._shape:
            return BadSampleError(
                f"{name} has an image of {image.shape}, the first one is {self._shape}; make them "
                "alike, by dataset.transform_first"
            )
        try:
            return image, check_label(label, self.num_classes, name, self.classes)
        except BadSampleError as error:
            return error


def good(sample: _Read) -> Sample:
    """``sample``; raises it where it is the error."""
    if isinstance(sample, BadSampleError):
        raise sample
    return sample


class _Readers:
    """Processes that read a dataset. One batch at a time is asked for, and divided among them."""

    def __init__(self, dataset: Any, count: int):
        fork = multiprocessing.get_context("fork")
        self._lock = threading.Lock()
        self._pipes: List[Connection] = []
        self._processes = []
        # In a forked process GPUs cannot be used. Where there are none, "all" draws other numbers
        # than the CPU alone does, and is kept for runs that began so.
        seeded = mx.cpu() if mx.context.num_gpus() else "all"
        for _ in range(count):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=_serve, args=(theirs, dataset, seeded), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        atexit.register(self.close)  # before multiprocessing's, which would wait for them

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
        atexit.unregister(self.close)
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, dataset: Any, seeded: Any) -> None:
    """Read the samples that are asked for, until the parent closes the pipe or is gone."""
    # Launchers and Slurm signal all processes of a rank, which saves, and for that may have to
    # finish an evaluation.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    _open_anew()
    own = held(dataset)
    with contextlib.suppress(EOFError, OSError):
        while os.getppid() == parent:
            # Other readers have this pipe's other end too, so that a killed parent leaves it open.
            if pipe.poll(_ALIVE_SECONDS):
                asked = pipe.recv()
                pipe.send([_read(dataset, index, seed, seeded, own) for index, seed in asked])
    os._exit(0)  # not what the parent has registered for its own end


def _open_anew() -> None:
    """Give this process positions of its own in the files that it has inherited for reading.

    A forked descriptor shares its position: of two processes that seek and read, each would get
    what the other has asked for.
    """
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own, or a file that may not be opened
            descriptor = int(name)
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            reads = flags & os.O_ACCMODE != os.O_WRONLY
            if reads and stat.S_ISREG(os.fstat(descriptor).st_mode):
                own = os.open(f"/proc/self/fd/{name}", flags)
                os.lseek(own, os.lseek(descriptor, 0, os.SEEK_CUR), os.SEEK_SET)
                os.dup2(own, descriptor)
                os.close(own)


def _read(
    dataset: Any, index: int, seed: int, seeded: Any = "all", own: Sequence[Any] = ()
) -> _Answer:
    """A sample, after MXNet's generators of the device ``seeded``, its ``own`` and all others were
    seeded."""
    try:
        seed_all(seed, mxnet=False)
        mx.random.seed(seed, ctx=seeded)
        seed_others(seed, own)
        sample = dataset[index]
        if wrong := no_pair(sample):
            return wrong
        image, label = map(on_host, sample)
        return image, label
    except Exception as error:  # a user's dataset and transforms may fail in any way
        return f"cannot be read: {describe_error(error)}"
    except BaseException:
        traceback.print_exc()
        return "cannot be read: its dataset gave up, see above"


def no_image(image: np.ndarray) -> str:
    """What an image must be that is none, and the way to it; "" if it is one."""
    shape, way_out = image.shape, ""
    shaped = image.ndim == 2 or (image.ndim == 3 and shape[-1] <= MOST_CHANNELS)
    if image.dtype == np.uint8 and shaped and 0 not in shape:
        return ""
    if image.ndim == 3 and not shaped and shape[0] <= MOST_CHANNELS:
        way_out = "; channels come last: np.moveaxis(images, -3, -1)"
    if image.dtype.kind == "f":
        way_out += "; fit scales pixels (data.mean, data.std): leave ToTensor, Normalize, / 255 out"
    elif image.dtype != np.uint8:
        way_out += "; if they are 0 to 255: images.astype('uint8')"
    return (
        f"must be uint8 (height, width), or (height, width, channels) of up to {MOST_CHANNELS} "
        f"channels, 0 to 255{way_out}"
    )


def no_pair(value: Any) -> str:
    """What is wrong with a sample that is no (image, label), after its name; "" if it is one."""
    many = isinstance(value, (tuple, list))
    length = f" of {len(value)}" if many else ""
    wrong = f"is a {type(value).__name__}{length}; a dataset must give (image, label)"
    return "" if many and len(value) == 2 else wrong


def on_host(value: Any) -> np.ndarray:
    """An MXNet array, a Pillow image or anything else, as a NumPy array."""
    if getattr(value, "mode", None) == "P":  # whose numbers are those of its palette
        value = value.convert("RGB")
    return value.asnumpy() if isinstance(value, mx.nd.NDArray) else np.asarray(value)

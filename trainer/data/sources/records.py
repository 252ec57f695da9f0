"""A set as record files, .rec with .idx, as MXNet's im2rec makes them.

A record file is a row of records: a magic number, the length, the content, padded to four bytes; a
content that holds the magic number itself is split there. The content of an image record is a
header (a flag, the label, two numbers; if the flag is not 0, so many labels follow) and an encoded
picture. The index holds a line for each record: its number and where it begins.

Records are read where the index says (``pread``), never a whole file; any number of threads may do
so at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ...config import Data
from ...console import warn
from ...dist import environment
from .. import sharding
from ..classes import Classes
from ..idx_file import BadSampleError, DataError, readable
from .base import Source, check_label, digest_of, probes
from .folder import CALLED, folder_of, tell_of_others
from .pictures import Pictures

_MAGIC = 0xCED7230A
_HEAD = struct.Struct("<II")  # magic number; length in the lower 29 bits, above it which part
_IMAGE = struct.Struct("<IfQQ")  # flag, label, two numbers
_LENGTH = (1 << 29) - 1
_WHOLE, _LAST = 0, 3  # parts of a record
_LABELS = 4096  # records at most whose labels are looked at before the first step


class _File(NamedTuple):
    path: Path
    opened: io.FileIO  # closed when nothing uses it any more
    about: os.stat_result  # as it was then


@dataclass(eq=False)
class RecordSource(Pictures):
    """Encoded pictures in record files."""

    files: Sequence[_File]
    places: np.ndarray  # int64 (N, 3): the file of each, its number in the index, where it begins

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        """The file and the number of the record, as its index has it."""
        which, key, _ = self.places[index]
        return f"record {key} of {self.files[which].path}"

    def read(self, index: int) -> Tuple[bytes, int]:
        content, _ = self.record(index)
        label, start = self._label(index, content)
        return content[start:], label

    def subset(self, indices: np.ndarray) -> RecordSource:
        return replace(self, places=self.places[indices])

    def all_labels(self) -> Optional[np.ndarray]:
        """The label of each record, int64 (N,), read from its beginning; -1 of bad ones."""
        found = np.full(len(self), -1)
        for index in range(len(self)):
            with self._to_be_skipped():
                found[index] = self._label_alone(index)
        return found

    def expect(self, num_classes: int) -> None:
        """Also look at labels, each rank at some, of as many records as take no time."""
        super().expect(num_classes)
        some = probes(len(self), _LABELS)
        for index in sharding.shard(some, environment.rank(), environment.size()):
            with self._to_be_skipped():
                self._label_alone(index)

    def images_digest(self) -> str:
        """Of the index, and of the content of a few records."""
        sizes = repr([file.about.st_size for file in self.files])
        where = self.places[:, 0].astype(np.int32).tobytes(), self.places[:, 2].tobytes()
        return digest_of(sizes, *where, *self._probed(lambda index: self.record(index)[0]))

    def _label_alone(self, index: int) -> int:
        return self._label(index, self.record(index, most=_IMAGE.size + 4)[0])[0]

    def _label(self, index: int, content: bytes) -> Tuple[int, int]:
        """(class, where the picture begins in the record)."""
        if len(content) < _IMAGE.size:
            raise BadSampleError(f"{self.name(index)} is too short to hold a picture")
        flag, label, _, _ = _IMAGE.unpack_from(content)
        if flag == 1 and len(content) >= _IMAGE.size + 4:
            (label,) = struct.unpack_from("<f", content, _IMAGE.size)
        if flag > 1:
            raise BadSampleError(
                f"{self.name(index)} has {flag} labels; it must have one: im2rec.py without "
                "--pack-label"
            )
        return check_label(label, self.num_classes, self.name(index)), _IMAGE.size + 4 * flag

    def record(self, index: int, most: int = _LENGTH) -> Tuple[bytes, int]:
        """(content of a record, or the first ``most`` bytes of it; where the next one begins)."""
        which, _, position = self.places[index].tolist()
        file = self.files[which]
        now, then = os.fstat(file.opened.fileno()), file.about
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise DataError(
                f"{file.path} has been written to since the run began; start again when it is whole"
            )
        parts: List[bytes] = []
        while True:
            head = self._bytes(index, file, position, _HEAD.size)
            magic, length = _HEAD.unpack(head)
            part, length = length >> 29, length & _LENGTH
            if magic != _MAGIC:
                raise BadSampleError(
                    f"{self.name(index)} does not begin where its index says, at byte {position}"
                )
            position += _HEAD.size
            parts.append(self._bytes(index, file, position, min(length, most)))
            position += -(-length // 4) * 4
            if part in (_WHOLE, _LAST) or length >= most:
                return _HEAD.pack(_MAGIC, 0)[:4].join(parts), position

    def _bytes(self, index: int, file: _File, position: int, count: int) -> bytes:
        left = max(0, file.about.st_size - position)
        with readable(self.name(index), BadSampleError):
            content = os.pread(file.opened.fileno(), min(count, left), position)
        if len(content) < count:
            raise BadSampleError(
                f"{self.name(index)} is cut short: the file ends after "
                f"{file.about.st_size} bytes; copy or make it anew, or set data.bad_samples=skip"
            )
        return content


def find(settings: Data, known: Classes = None, needs_train: bool = True) -> Dict[str, Source]:
    """The sets in ``data.folder`` that there are, as ``train``, ``validation`` and ``test``.

    Each is all files whose first or last word is its name, sorted: ``train.rec``, ``train_0.rec``,
    ``pets_train.rec``, but not ``trainval.rec``. Raises DataError where there is none, a name is
    that of two sets, or an index is missing or damaged.
    """
    root = folder_of(settings)
    found: Dict[str, List[Path]] = {called: [] for called in CALLED.values()}
    others: List[Path] = []
    for path in sorted(root.glob("[!.]*.rec")):
        words = re.findall("[a-z]+", path.stem.lower())
        called = {CALLED[word] for word in (*words[:1], *words[-1:]) if word in CALLED}
        if len(called) > 1:  # im2rec's for a list that is called train
            raise DataError(
                f"{path} may be of the set {' or '.join(sorted(called))}; rename it, and its .idx"
            )
        (found[called.pop()] if called else others).append(path)
    tell_of_others(root, [path.name for path in others])
    if needs_train and not found["train"]:
        raise DataError(
            f"folder {root} holds no train.rec, train_*.rec or *_train.rec; make it by MXNet's "
            "tools/im2rec.py"
        )
    return {called: _opened(paths, settings) for called, paths in found.items() if paths}


def _opened(paths: Sequence[Path], settings: Data) -> RecordSource:
    files, places, lasts, count = [], [], [], 0
    for number, path in enumerate(paths):
        places.append(np.insert(_index(path.with_suffix(".idx")), 0, number, axis=1))
        lasts.append(count + int(places[-1][:, 2].argmax()))
        count += len(places[-1])
        with readable(path):
            opened = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with the source)
        files.append(_File(path, opened, os.fstat(opened.fileno())))
    source = RecordSource(settings, files, np.concatenate(places))
    for file, last in zip(files, lasts):
        with contextlib.suppress(BadSampleError):  # told of when it is trained on
            if source.record(last)[1] < file.about.st_size and environment.rank() == 0:
                warn(
                    f"{file.path} goes on behind the last record of its index; the rest is not "
                    "read: if the index is not meant to be a part, make it anew by rec2idx.py"
                )
    return source


def _index(path: Path) -> np.ndarray:
    """int64 (N, 2): number and beginning of each record, in the order of the index."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; a record file needs its index, which "
            "im2rec.py writes, or rec2idx.py of a file that has none"
        ) from None
    lines = text.count("\n") + (not text.endswith("\n"))
    with np.testing.suppress_warnings() as warnings:
        warnings.filter(DeprecationWarning)  # of text that is no number, told below
        numbers = np.fromstring(text, np.int64, sep=" ")
    if not len(numbers) or len(numbers) != 2 * lines or numbers.min() < 0:
        raise DataError(
            f"{path} is no index of records, or is cut short; it must hold a number and an offset "
            "in each line: make it anew by rec2idx.py"
        )
    return numbers.reshape(-1, 2)

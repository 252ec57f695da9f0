"""A set as a folder of pictures: FOLDER/train/CLASS/*, or FOLDER/CLASS/* alone.

Listings are sorted, so that a sample has the same number on every rank and file system. Only names
are read at the start; each rank opens the files of its own shards.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

import numpy as np

from ...config import Data
from ...console import warn
from ...dist import environment
from ..classes import Classes
from ..idx_file import BadSampleError, DataError, listed, readable
from ..pictures.decode import SUFFIXES
from .base import digest_of
from .pictures import Pictures

TRAIN, VALIDATION, TEST = "train", "val", "test"
_ALSO_VALIDATION = ("valid", "validation")
_NAMED = 5  # things that are not read


class FolderSource(Pictures):
    """Pictures in one folder for each class.

    Args:
        root: the folder of the classes' folders.
        files: paths in it.
        labels: the class of each.
        classes: the names of the classes' folders.
    """

    def __init__(
        self, root: Path, files: Sequence[str], labels: np.ndarray, classes: Classes, settings: Data
    ):
        super().__init__(settings)
        self._root, self._files = root, files
        self.labels: np.ndarray = labels
        self.classes = classes

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The path of the file, as printable text: names are bytes, and need not be UTF-8."""
        return listed([self._root / self._files[index]], 1)

    def read(self, index: int) -> Tuple[bytes, int]:
        with readable(self.name(index), BadSampleError):
            content = Path(self._root, self._files[index]).read_bytes()
        return content, int(self.labels[index])

    def subset(self, indices: np.ndarray) -> FolderSource:
        files = [self._files[index] for index in indices]
        return FolderSource(self._root, files, self.labels[indices], self.classes, self._settings)

    def images_digest(self) -> str:
        """Of all names, and of the content of a few files."""
        return digest_of("\0".join(self._files), *self._probed(lambda index: self.read(index)[0]))


def find(
    settings: Data, known: Classes = None, needs_train: bool = True
) -> Tuple[Optional[FolderSource], Optional[FolderSource], Optional[FolderSource]]:
    """The training set in ``data.folder``; and the validation and the test set, if there.

    Raises DataError where there is none, a class has no picture, or another set has other classes.

    Args:
        known: the classes of a trained net; None takes those of the training set.
        needs_train: whether another set may not stand alone.
    """
    assert settings.folder is not None  # checked by the settings
    root = Path(settings.folder).expanduser()
    within, every = _entries(root), (TRAIN, VALIDATION, *_ALSO_VALIDATION, TEST)
    parts = [entry.name for entry in within if entry.name in every and _is_folder(entry)]
    validation = [name for name in parts if name not in (TRAIN, TEST)]
    if len(validation) > 1:
        raise DataError(f"folder {root} holds {' and '.join(validation)}; leave one of them")
    if TRAIN not in parts:
        if parts and needs_train:
            raise DataError(
                f"folder {root} holds {' and '.join(parts)}, but no {TRAIN}: put the "
                f"training pictures into {root / TRAIN}/CLASS/"
            )
        if not parts:
            return _listed(root, settings, known), None, None
    train = _listed(root / TRAIN, settings, known) if TRAIN in parts else None
    others = [
        _listed(root / name, settings, known if train is None else train.classes)
        if name in parts
        else None
        for name in ("".join(validation), TEST)
    ]
    _tell_of_others(root, [entry.name for entry in within if entry.name not in parts])
    return train, others[0], others[1]


def _listed(root: Path, settings: Data, known: Classes) -> FolderSource:
    """The pictures in the folders in ``root``, one for each class, sorted by name."""
    within = _entries(root)
    names = {entry.name: None for entry in within if _is_folder(entry)}  # in order
    if not names:
        raise DataError(
            f"folder {root} holds no folder; it must hold one for each class, and the pictures in "
            "them"
        )
    called = [listed([name], 1) for name in names]
    classes = tuple(called) if known is None else known
    places = {_composed(str(label)): number for number, label in enumerate(classes)}
    places.update((str(label), number) for number, label in enumerate(classes))
    numbers = [places.get(name, places.get(_composed(name), -1)) for name in called]
    if -1 in numbers:
        raise DataError(
            f"folder {root} has a class {called[numbers.index(-1)]}, and what was trained on has "
            f"not: it has {listed(classes, 10)}"
        )
    files: List[str] = []
    counts, others = [], [entry.name for entry in within if entry.name not in names]
    for name in names:
        every = _entries(root / name)
        found = [
            f"{name}/{entry.name}"
            for entry in every  # one with a link that leads nowhere is a bad sample
            if entry.name.lower().endswith(SUFFIXES) and (entry.is_symlink() or entry.is_file())
        ]
        if not found:
            raise DataError(
                f"folder {root / name} holds no picture (*{', *'.join(SUFFIXES)}); put some into "
                "it, or remove it"
            )
        others += sorted({f"{name}/{entry.name}" for entry in every} - {*found})
        files += found
        counts.append(len(found))
    _tell_of_others(root, others)
    return FolderSource(root, files, np.repeat(numbers, counts), classes, settings)


def _tell_of_others(root: Path, others: Sequence[str]) -> None:
    if others and environment.rank() == 0:
        what = f"{len(others)} files or folders that are not read"
        warn(f"folder {root} holds {what}: {listed(others, _NAMED)}")


def _composed(name: str) -> str:
    """With each accent in its letter: macOS writes it as one of its own."""
    return unicodedata.normalize("NFC", name)


def _entries(place: Path) -> List[os.DirEntry[str]]:
    """What is in a folder, without hidden files such as macOS's ._photo.jpg, sorted by name."""
    with readable(f"folder {place}"), os.scandir(place) as entries:
        return sorted((e for e in entries if e.name[0] != "."), key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with readable(listed([entry.path], 1)):  # a link may lead to itself, or into a closed home
        return entry.is_dir()

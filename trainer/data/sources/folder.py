"""A set as a folder of pictures: FOLDER/train/CLASS/*, or FOLDER/CLASS/* alone.

Listings are sorted, so that a sample has the same number on every rank and file system. Only names
are read at the start; each rank opens the files of its own shards.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

import numpy as np

from ...config import Data
from ...console import warn
from ...dist import environment
from ..classes import Classes
from ..idx_file import BadSampleError, DataError, readable
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
        return _shown(os.path.join(self._root, self._files[index]))

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


def _shown(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find(
    settings: Data, known: Classes = None, needs_train: bool = True
) -> Tuple[Optional[FolderSource], Optional[FolderSource], Optional[FolderSource]]:
    """The training set in ``data.folder``; and the validation and the test set, if there.

    Args:
        known: the classes of a trained net; None takes those of the training set.
        needs_train: whether another set may not stand alone.

    Raises:
        DataError: there is none, a class has no picture, or another set has other classes.
    """
    assert settings.folder is not None  # checked by the settings
    root = Path(settings.folder).expanduser()
    validation = [n for n in (VALIDATION, *_ALSO_VALIDATION) if (root / n).is_dir()]
    parts = [name for name in (TRAIN, *validation, TEST) if (root / name).is_dir()]
    if len(validation) > 1:
        raise DataError(f"folder {root} holds {' and '.join(validation)}; leave one of them")
    if TRAIN not in parts:
        if parts and needs_train:
            raise DataError(
                f"folder {root} holds {' and '.join(sorted(parts))}, but no {TRAIN}: put the "
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
    _tell_of_others(root, [e.name for e in _entries(root) if e.name not in parts])
    return train, others[0], others[1]


def _listed(root: Path, settings: Data, known: Classes) -> FolderSource:
    """The pictures in the folders in ``root``, one for each class, sorted by name."""
    within = _entries(root)
    names = [entry.name for entry in within if entry.is_dir()]
    if not names:
        raise DataError(
            f"folder {root} holds no folder; it must hold one for each class, and the pictures in "
            "them"
        )
    called = list(map(_shown, names))
    classes = tuple(called) if known is None else known
    unknown = [name for name in called if name not in classes]
    if unknown:
        raise DataError(
            f"folder {root} has a class {unknown[0]}, and what was trained on has not: it has "
            f"{', '.join(map(str, classes[:10]))}{', ...' * (len(classes) > 10)}"
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
    numbers = [classes.index(name) for name in called]
    return FolderSource(root, files, np.repeat(numbers, counts), classes, settings)


def _tell_of_others(root: Path, others: Sequence[str]) -> None:
    if others and environment.rank() == 0:
        shown = _shown(", ".join(others[:_NAMED])) + ", ..." * (len(others) > _NAMED)
        warn(f"folder {root} holds {len(others)} files or folders that are not read: {shown}")


def _entries(place: Path) -> List[os.DirEntry[str]]:
    """What is in a folder, without hidden files such as macOS's ._photo.jpg, sorted by name."""
    with readable(f"folder {place}"), os.scandir(place) as entries:
        return sorted((e for e in entries if e.name[0] != "."), key=lambda entry: entry.name)

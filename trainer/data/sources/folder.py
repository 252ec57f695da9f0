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
from ..classes import Classes
from ..idx_file import BadSampleError, DataError
from ..pictures.decode import SUFFIXES
from .base import digest_of, probes
from .pictures import Pictures

TRAIN, VALIDATION, TEST = "train", "val", "test"


class FolderSource(Pictures):
    """Pictures in one folder for each class.

    Args:
        root: the folder of the classes' folders.
        files: paths in it.
        labels: the class of each.
        classes: the names of the classes' folders.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        labels: np.ndarray,
        classes: Classes,
        settings: Data,
    ):
        super().__init__(settings)
        self._root, self._files = root, files
        self.labels: np.ndarray = labels
        self.classes = classes

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The path of the file, as printable text: names are bytes, and need not be UTF-8."""
        path = os.path.join(self._root, self._files[index])
        return os.fsencode(path).decode("utf-8", "backslashreplace")

    def read(self, index: int) -> Tuple[bytes, int]:
        """See :class:`Pictures`."""
        try:
            with open(os.path.join(self._root, self._files[index]), "rb") as file:
                return file.read(), int(self.labels[index])
        except OSError as error:
            raise BadSampleError(f"{self.name(index)} cannot be read: {error.strerror}") from None

    def subset(self, indices: np.ndarray) -> FolderSource:
        """See :class:`Source`."""
        files = [self._files[index] for index in indices]
        return FolderSource(self._root, files, self.labels[indices], self.classes, self._settings)

    def images_digest(self) -> str:
        """Of all names, and of the content of a few files."""
        content = []
        for index in probes(len(self)):
            try:
                content.append(self.read(index)[0])
            except BadSampleError:  # told when it is trained on
                content.append(b"")
        return digest_of("\0".join(self._files), *content)


def find(
    settings: Data, known: Classes = None
) -> Tuple[FolderSource, Optional[FolderSource], Optional[FolderSource]]:
    """The training set in ``data.folder``; and the validation and the test set, if there.

    Args:
        known: the classes of a trained net; None takes those of the training set.

    Raises:
        DataError: there is none, a class has no picture, or another set has other classes.
    """
    assert settings.folder is not None  # checked by the settings
    root = Path(settings.folder).expanduser()
    parts = {name for name in (TRAIN, VALIDATION, TEST) if (root / name).is_dir()}
    if TRAIN not in parts:
        if parts:
            raise DataError(
                f"folder {root} holds {' and '.join(sorted(parts))}, but no {TRAIN}: put the "
                f"training pictures into {root / TRAIN}/CLASS/"
            )
        return _listed(root, settings, known), None, None
    train = _listed(root / TRAIN, settings, known)
    others = [
        _listed(root / name, settings, train.classes) if name in parts else None
        for name in (VALIDATION, TEST)
    ]
    return train, others[0], others[1]


def _listed(root: Path, settings: Data, known: Classes) -> FolderSource:
    """The pictures in the folders in ``root``, one for each class, sorted by name."""
    names = _entries(root, folders=True)
    if not names:
        raise DataError(
            f"folder {root} holds no folder; it must hold one for each class, and the pictures in "
            "them"
        )
    classes = tuple(names) if known is None else known
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise DataError(
            f"folder {root} has a class {unknown[0]}, and what was trained on has not: it has "
            f"{', '.join(map(str, classes[:10]))}{', ...' * (len(classes) > 10)}"
        )
    files: List[str] = []
    counts = []
    for name in names:
        found = [
            f"{name}/{file}"
            for file in _entries(root / name, folders=False)
            if file.lower().endswith(SUFFIXES)
        ]
        if not found:
            raise DataError(f"folder {root / name} holds no picture (*{', *'.join(SUFFIXES)})")
        files += found
        counts.append(len(found))
    numbers = [classes.index(name) for name in names]
    return FolderSource(root, files, np.repeat(numbers, counts), classes, settings)


def _entries(place: Path, folders: bool) -> List[str]:
    """The names of the folders or the files in a folder, without hidden ones, sorted."""
    try:
        with os.scandir(place) as entries:
            return sorted(
                entry.name
                for entry in entries
                if not entry.name.startswith(".")  # e.g. ._photo.jpg from macOS
                and (entry.is_dir() if folders else entry.is_file())
            )
    except OSError as error:
        raise DataError(f"folder {place} cannot be read: {error.strerror}") from None

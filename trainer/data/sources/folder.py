"""A set as a folder of pictures: FOLDER/train/CLASS/*, or FOLDER/CLASS/* alone.

Listings are sorted, so that a sample has the same number on every rank and file system. Only names
are read at the start; each rank opens the files of its own shards.
"""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np

from ...config import Data
from ...console import warn
from ...dist import environment
from ..classes import Classes
from ..idx_file import BadSampleError, DataError, folder_at, listed, readable
from ..pictures.decode import SUFFIXES
from .base import Source, digest_of
from .pictures import Pictures

CALLED = {  # folders of sets, the training set first
    "train": "train",
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    "test": "test",
}
# What systems leave on disks and in archives.
_OF_SYSTEMS = "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"
_NAMED = 5  # things that are not read


@dataclass(eq=False)
class FolderSource(Pictures):
    """Pictures in one folder for each class."""

    root: Path  # the folder of the classes' folders
    files: Sequence[str]  # paths in it
    labels: np.ndarray  # the class of each, int64 (N,)
    classes: Classes  # the names of the classes' folders

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The path of the file, as printable text: names are bytes, and need not be UTF-8."""
        return listed([self.root / self.files[index]], 1)

    def read(self, index: int) -> Tuple[bytes, int]:
        with readable(self.name(index), BadSampleError):
            content = Path(self.root, self.files[index]).read_bytes()
        return content, int(self.labels[index])

    def subset(self, indices: np.ndarray) -> FolderSource:
        files = [self.files[index] for index in indices]
        return replace(self, files=files, labels=self.labels[indices])

    def images_digest(self) -> str:
        """Of all names, and of the content of a few files."""
        return digest_of("\0".join(self.files), *self._probed(lambda index: self.read(index)[0]))


def find(settings: Data, known: Classes = None, needs_train: bool = True) -> Dict[str, Source]:
    """The sets in ``data.folder`` that there are, as ``train``, ``validation`` and ``test``.

    Raises DataError where there is none, a class has no picture, or another set has other classes.

    Args:
        known: the classes of a trained net; None takes those of the training set.
        needs_train: whether another set may not stand alone.
    """
    root = folder_of(settings)
    within = _entries(root)
    parts = [entry.name for entry in within if entry.name in CALLED and _is_folder(entry)]
    validation = [name for name in parts if CALLED[name] == "validation"]
    if len(validation) > 1:
        raise DataError(f"folder {root} holds {' and '.join(validation)}; leave one of them")
    if not parts:
        return {"train": _listed(root, settings, known)}
    if "train" not in parts and needs_train:
        raise DataError(
            f"folder {root} holds {' and '.join(parts)}, but no train: put the training pictures "
            f"into {root}/train/CLASS/"
        )
    found: Dict[str, Source] = {}
    for name in sorted(parts, key=list(CALLED).index):
        found[CALLED[name]] = source = _listed(root / name, settings, known)
        known = source.classes
    tell_of_others(root, [entry.name for entry in within if entry.name not in parts])
    return found


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
    forms = [name for name in called if [*map(_composed, called)].count(_composed(name)) > 1]
    if known is None and forms:
        raise DataError(
            f"folder {root} holds a name in two forms of Unicode: "
            f"{', '.join(map(ascii, forms))}; put the pictures into one of them"
        )
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
            below = [entry.name for entry in every if _is_folder(entry)]
            way_out = "; put some into it, or remove it"
            if below:
                way_out = (
                    f", but folders: {listed(below, _NAMED)}; sets are called train, val and test, "
                    "and pictures lie in their class's folder itself"
                )
            raise DataError(
                f"folder {root / name} holds no picture (*{', *'.join(SUFFIXES)}){way_out}"
            )
        others += sorted({f"{name}/{entry.name}" for entry in every} - {*found})
        files += found
        counts.append(len(found))
    tell_of_others(root, others)
    return FolderSource(settings, root, files, np.repeat(numbers, counts), classes)


def folder_of(settings: Data) -> Path:
    """``data.folder``, which the settings of such sets always name."""
    assert settings.folder is not None
    return folder_at(settings.folder)


def tell_of_others(root: Path, others: Sequence[str]) -> None:
    """Say what lies in a folder and is not read."""
    if others and environment.rank() == 0:
        what = f"{len(others)} files or folders that are not read"
        warn(f"folder {root} holds {what}: {listed(others, _NAMED)}")


def _composed(name: str) -> str:
    """With each accent in its letter: macOS writes it as one of its own."""
    return unicodedata.normalize("NFC", name)


def _entries(place: Path) -> List[os.DirEntry[str]]:
    """What is in a folder, without hidden files such as macOS's ._photo.jpg, sorted by name."""
    with readable(f"folder {place}"), os.scandir(place) as entries:
        shown = (e for e in entries if e.name[0] != "." and e.name not in _OF_SYSTEMS)
        return sorted(shown, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with readable(listed([entry.path], 1)):  # a link may lead to itself, or into a closed home
        lost = entry.is_symlink() and not os.path.exists(entry.path)
        # A class, or a set, on a disk that is not there is told of when it is opened.
        return entry.is_dir() or (lost and not entry.name.lower().endswith(SUFFIXES))

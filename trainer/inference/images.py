"""Reads images of any format and size and converts them to the net's: small, light on dark.

Fashion-MNIST's own makers trimmed, shrank, centred, negated and greyed their photographs (Xiao,
Rasul and Vollgraf 2017, arXiv:1708.07747, figure 1). Trimming is left to the user, and so is the
decision whether to negate: a file does not tell whether its bright parts are the object.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageOps

from ..config import Data
from ..data import idx_file
from ..data.idx_file import DataError, listed, readable
from ..data.pictures import crop, decode
from ..data.pictures.decode import SUFFIXES, UnreadableError

_NAMED = 10  # files of unknown kinds at most


class Images(NamedTuple):
    """Images read from files."""

    names: List[str]  # path of the file; within an IDX file with the index: PATH[17]
    pixels: np.ndarray  # uint8 (N, H, W), or (N, H, W, 3) in colour
    skipped: List[str]  # why files were left out, a line each


def read(
    paths: Sequence[str],
    shape: Tuple[int, ...],
    invert: bool = False,
    strict: bool = False,
    pictures: Optional[Data] = None,
) -> Images:
    """The images in files, in folders (and folders below them), and in IDX files, gzipped or not.

    Files that cannot be read are left out. DataError says in one line which path does not exist, or
    that no image can be read.

    Args:
        shape: (height, width), or (height, width, 3) for colour; images are scaled to fit, keeping
            their aspect ratio, and padded with background.
        invert: negate, for dark objects on a light ground. Transparency is always background.
        strict: refuse files that cannot be read.
        pictures: of a net that was trained on pictures; they are cut and scaled as in its
            evaluation instead.
    """
    if pictures is None and shape[2:] not in ((), (3,)):
        raise DataError(f"the net takes {shape[2]} channels; files hold grey levels or 3 colours")
    names: List[str] = []
    pixels = bytearray()  # of all: it grows in place, and is held once
    skipped: List[str] = []
    files, unread = _files(paths)
    for path in files:
        try:
            with readable(listed([path], 1)):
                for name, image in _read(path, shape, invert, pictures):
                    names.append(name)
                    pixels += image.tobytes()
                    shape = image.shape
        except DataError as error:
            skipped.append(str(error))
        except UnreadableError as error:
            skipped.append(f"{listed([path], 1)} cannot be read: {error}")
        if strict and skipped:
            break
    skipped += unread
    if strict and skipped:
        raise DataError(skipped[0])
    if not names:
        more = f" (and {len(skipped) - 1} more such lines)" if skipped[1:] else ""
        raise DataError(f"{skipped[0]}{more}")
    return Images(names, np.frombuffer(pixels, np.uint8).reshape(-1, *shape), skipped)


def _files(paths: Sequence[str]) -> Tuple[List[Path], List[str]]:
    """The files to read, and of each folder, in words, what is not read."""
    files: List[Path] = []
    unread: List[str] = []
    for given in map(Path, paths):
        if not given.is_dir():
            if not os.path.lexists(given):
                raise DataError(f"there is no file or folder {given}")
            files.append(given)
            continue
        every = _in_folder(given)
        if not every:
            raise DataError(f"folder {given} holds no image (*{', *'.join(SUFFIXES)})")
        known = [path for path in every if path.name.lower().endswith(SUFFIXES)]
        others = sorted(path.relative_to(given) for path in {*every} - {*known})
        if others:
            what = "1 file is" if len(others) == 1 else f"{len(others)} files are"
            shown = listed(others, _NAMED)
            unread.append(f"{listed([given], 1)}: {what} of kinds that are not read: {shown}")
        files += known
    return files, unread


def _in_folder(folder: Path) -> List[Path]:
    """The files in a folder and those below it, each folder once, sorted by path.

    Without hidden ones, such as ._photo.jpg from macOS, and .Trash-1000.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"folder {error.filename} cannot be read: {error.strerror}")

    found, seen = [], set()
    for place, below, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        below[:] = [] if real in seen else sorted(name for name in below if name[0] != ".")
        paths = [Path(place, name) for name in names if name[0] != "." and real not in seen]
        # A link that leads nowhere is told of, as one that cannot be read.
        found += [p for p in paths if os.path.isfile(p) or not os.path.exists(p)]
        seen.add(real)
    return sorted(found)


def _read(
    path: Path, shape: Tuple[int, ...], invert: bool, pictures: Optional[Data]
) -> Iterator[Tuple[str, np.ndarray]]:
    """(name, pixels) of each image in a file, light on dark, see :func:`read`."""
    name, mode = listed([path], 1), "RGB" if shape[2:] else "L"
    if pictures is not None:
        yield name, crop.cut(path.read_bytes(), pictures, invert=invert)
        return
    with open(path, "rb") as file:
        start = file.read(4)
        if start[:2] != b"\x1f\x8b" and not idx_file.is_magic(start):
            yield name, _fit(name, decode.by_pillow(start + file.read(), mode, invert), shape[:2])
            return
    for index, values in enumerate(idx_file.read(path, "images")):
        image = Image.fromarray(values).convert(mode)
        image = ImageOps.invert(image) if invert else image
        yield f"{name}[{index}]", _fit(f"{name}[{index}]", image, shape[:2])


def _fit(name: str, image: Image.Image, size: Tuple[int, ...]) -> np.ndarray:
    """uint8 (H, W[, 3]); an image of that size is not resampled."""
    height, width = size
    if image.size != (width, height):
        try:
            image = ImageOps.pad(image, (width, height), method=Image.Resampling.LANCZOS)
        except ValueError:  # it would have no pixel left in one direction
            raise DataError(
                f"{name} is {image.width} x {image.height} pixels, too narrow to be fitted into "
                f"{width} x {height}; crop it"
            ) from None
    return np.asarray(image, np.uint8)

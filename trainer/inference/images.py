"""Reads images of any format and size and converts them to the net's: small, light on dark.

Fashion-MNIST's own makers trimmed, shrank, centred, negated and greyed their photographs (Xiao,
Rasul and Vollgraf 2017, arXiv:1708.07747, figure 1). Trimming is left to the user, and so is the
decision whether to negate: a file does not tell whether its bright parts are the object.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
from PIL import Image, ImageOps

from ..data import idx_file
from ..data.idx_file import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes
_LIGHT = 128  # of 255


class Images(NamedTuple):
    """Images read from files."""

    names: List[str]  # path of the file; within an IDX file with the index: PATH[17]
    pixels: np.ndarray  # uint8 (N, H, W), or (N, H, W, 3) in colour

    @property
    def light_backgrounds(self) -> int:
        """The number of images whose border is light rather than dark."""
        top_bottom, sides = self.pixels[:, (0, -1), :], self.pixels[:, 1:-1, (0, -1)]
        count = len(self.pixels)
        edge = np.concatenate([top_bottom.reshape(count, -1), sides.reshape(count, -1)], axis=1)
        return int((np.median(edge, axis=1) >= _LIGHT).sum())


def read(paths: Sequence[str], shape: Tuple[int, ...], invert: bool = False) -> Images:
    """The images in files, in folders (and folders below them), and in IDX files, gzipped or not.

    Args:
        shape: (height, width), or (height, width, 3) for colour; images are scaled to fit, keeping
            their aspect ratio, and padded with background.
        invert: negate, for dark objects on a light ground. Transparency is always background.

    Raises:
        DataError: a path does not exist, is not an image, or contains none; one line.
    """
    if shape[2:] not in ((), (3,)):
        raise DataError(f"the net takes {shape[2]} channels; files hold grey levels or 3 colours")
    names: List[str] = []
    pixels: List[np.ndarray] = []
    mode = "RGB" if shape[2:] else "L"
    for path in _files(paths):
        for name, image in _images(path, invert, mode):
            names.append(name)
            try:
                pixels.append(_fit(image, shape[:2]))
            except ValueError:  # it would have no pixel left in one direction
                raise DataError(
                    f"{name} is {image.width} x {image.height} pixels, too narrow to be fitted "
                    f"into {shape[1]} x {shape[0]}; crop it"
                ) from None
    return Images(names, np.stack(pixels))


def _files(paths: Sequence[str]) -> Iterator[Path]:
    for given in map(Path, paths):
        try:
            is_folder = stat.S_ISDIR(given.stat().st_mode)
        except FileNotFoundError:
            raise DataError(f"there is no file or folder {given}") from None
        except OSError as error:
            raise DataError(f"{given} cannot be read: {error.strerror}") from None
        yield from _in_folder(given) if is_folder else [given]


def _in_folder(folder: Path) -> List[Path]:
    """The images in a folder and its subfolders, without hidden ones, sorted by path."""

    def refuse(error: OSError) -> None:
        raise DataError(f"folder {error.filename} cannot be read: {error.strerror}")

    found = [
        Path(place, name)
        for place, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if name.lower().endswith(SUFFIXES)
        and not name.startswith(".")  # e.g. ._photo.jpg from macOS
    ]
    found = sorted(path for path in found if os.path.isfile(path))
    if not found:
        raise DataError(f"folder {folder} holds no image (*{', *'.join(SUFFIXES)})")
    return found


def _images(path: Path, invert: bool, mode: str) -> Iterator[Tuple[str, Image.Image]]:
    """(name, image) of each image in a file, in Pillow's ``mode`` L or RGB, light on dark."""
    if _is_idx(path):
        for index, values in enumerate(idx_file.read(path, "images")):
            image = Image.fromarray(values).convert(mode)
            yield f"{_shown(path)}[{index}]", ImageOps.invert(image) if invert else image
    else:
        yield _shown(path), _open(path, invert, mode)


def _shown(path: Path) -> str:
    """The path as printable text: file names are bytes, and need not be UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_idx(path: Path) -> bool:
    """By its first bytes, because IDX files have all kinds of names."""
    try:
        with open(path, "rb") as file:
            return file.read(2) in (b"\0\0", b"\x1f\x8b")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _open(path: Path, invert: bool, mode: str) -> Image.Image:
    """Read an image file, composited on black."""
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
            assert image is not None  # only with in_place=True
    except Image.UnidentifiedImageError:
        raise DataError(
            f"{path} is neither an image that Pillow knows nor an IDX file of images"
        ) from None
    # Pillow's decoders raise all kinds of exceptions on broken files.
    except Exception as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if image.mode not in _EIGHT_BIT:
        raise DataError(
            f"{path} has pixels of Pillow's mode {image.mode}; convert it to grey or RGB of 8 bits"
        )
    image = image.convert("RGBA")
    opaque, opacity = image.convert(mode), image.getchannel("A")
    if invert:
        opaque = ImageOps.invert(opaque)
    return Image.composite(opaque, Image.new(mode, image.size), opacity)


def _fit(image: Image.Image, size: Tuple[int, ...]) -> np.ndarray:
    """uint8 (H, W[, 3]); an image of that size is not resampled."""
    height, width = size
    if image.size != (width, height):
        image = ImageOps.pad(image, (width, height), method=Image.Resampling.LANCZOS)
    return np.asarray(image, np.uint8)

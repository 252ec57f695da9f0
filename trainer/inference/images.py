"""Reads images of any format and size and converts them to the net's: small, light on dark.

Fashion-MNIST's own makers trimmed, shrank, centred, negated and greyed their photographs (Xiao,
Rasul and Vollgraf 2017, arXiv:1708.07747, figure 1). Trimming is left to the user, and so is the
decision whether to negate: a file does not tell whether its bright parts are the object.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
from PIL import Image, ImageOps

from ..config import Data
from ..data import idx_file
from ..data.idx_file import DataError
from ..data.pictures import crop, decode
from ..data.pictures.decode import SUFFIXES, UnreadableError

_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes
_LIGHT = 128  # of 255
_NAMED = 10  # files of unknown kinds at most
_IDX_TYPES = (b"\x08", b"\x09", b"\x0b", b"\x0c", b"\x0d", b"\x0e")  # a file's third byte
_HEIC = ("heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1")  # brands


class Images(NamedTuple):
    """Images read from files."""

    names: List[str]  # path of the file; within an IDX file with the index: PATH[17]
    pixels: np.ndarray  # uint8 (N, H, W), or (N, H, W, 3) in colour
    light_backgrounds: int  # images whose border is light rather than dark
    skipped: List[str]  # why files were left out, a line each


def read(
    paths: Sequence[str], shape: Tuple[int, ...], invert: bool = False, strict: bool = False
) -> Images:
    """The images in files, in folders (and folders below them), and in IDX files, gzipped or not.

    Files that cannot be read are left out.

    Args:
        shape: (height, width), or (height, width, 3) for colour; images are scaled to fit, keeping
            their aspect ratio, and padded with background.
        invert: negate, for dark objects on a light ground. Transparency is always background.
        strict: refuse files that cannot be read.

    Raises:
        DataError: a path does not exist, or no image can be read; one line.
    """
    if shape[2:] not in ((), (3,)):
        raise DataError(f"the net takes {shape[2]} channels; files hold grey levels or 3 colours")
    mode = "RGB" if shape[2:] else "L"

    def each(path: Path) -> Iterator[Tuple[str, np.ndarray, bool]]:
        for name, image in _images(path, invert, mode):
            yield name, _fit(name, image, shape[:2]), _has_light_border(image)

    return _gathered(paths, each, strict)


def _has_light_border(image: Image.Image) -> bool:
    pixels = np.asarray(image)
    edges = (pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1])
    return bool(np.median(np.concatenate([edge.ravel() for edge in edges])) >= _LIGHT)


def read_pictures(
    paths: Sequence[str], settings: Data, invert: bool = False, strict: bool = False
) -> Images:
    """The pictures in files and folders, cut and scaled as in the evaluation of a run on pictures.

    Args:
        invert, strict: as for :func:`read`.

    Raises:
        DataError: a path does not exist, or no picture can be read; one line.
    """

    def one(path: Path) -> Iterator[Tuple[str, np.ndarray, bool]]:
        try:
            pixels = crop.cut(path.read_bytes(), settings)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        except UnreadableError as error:
            raise DataError(f"{_shown(path)} is a bad picture: {error}") from None
        yield _shown(path), 255 - pixels if invert else pixels, False

    return _gathered(paths, one, strict)


def _gathered(
    paths: Sequence[str],
    images: Callable[[Path], Iterator[Tuple[str, np.ndarray, bool]]],
    strict: bool,
) -> Images:
    """All (name, pixels, whether its border is light) that ``images`` gives of the files."""
    names: List[str] = []
    pixels: List[np.ndarray] = []
    light, skipped = 0, []
    files, unknown = _files(paths)
    for path, why in [*((path, "") for path in files), *unknown]:
        try:
            if why:
                raise DataError(why)
            for name, image, is_light in images(path):
                pixels.append(image)
                names.append(name)
                light += is_light
        except DataError as error:
            if strict:
                raise
            skipped.append(str(error))
    if not names:
        more = f" (and {len(skipped) - 1} more such lines)" if skipped[1:] else ""
        raise DataError(f"{skipped[0]}{more}")
    return Images(names, np.stack(pixels), light, skipped)


def _files(paths: Sequence[str]) -> Tuple[List[Path], List[Tuple[Path, str]]]:
    """The files to read, and each folder with files of other kinds, in words."""
    files: List[Path] = []
    unknown: List[Tuple[Path, str]] = []
    for given in map(Path, paths):
        try:
            is_folder = stat.S_ISDIR(given.stat().st_mode)
        except FileNotFoundError:
            raise DataError(f"there is no file or folder {given}") from None
        except OSError as error:
            raise DataError(f"{given} cannot be read: {error.strerror}") from None
        found, others = _in_folder(given) if is_folder else ([given], [])
        files += found
        if others:
            shown = ", ".join(_shown(path.relative_to(given)) for path in others[:_NAMED])
            shown += f" and {len(others) - _NAMED} more" if others[_NAMED:] else ""
            what = "1 file is" if len(others) == 1 else f"{len(others)} files are"
            unknown.append((given, f"{_shown(given)}: {what} of kinds that are not read: {shown}"))
        elif not found:
            raise DataError(f"folder {given} holds no image (*{', *'.join(SUFFIXES)})")
    return files, unknown


def _in_folder(folder: Path) -> Tuple[List[Path], List[Path]]:
    """The images, and the other files, in a folder and its subfolders, sorted by path.

    Without hidden ones, such as ._photo.jpg from macOS.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"folder {error.filename} cannot be read: {error.strerror}")

    found = sorted(
        Path(place, name)
        for place, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if not name.startswith(".") and os.path.isfile(os.path.join(place, name))
    )
    images = [path for path in found if path.name.lower().endswith(SUFFIXES)]
    return images, [path for path in found if not path.name.lower().endswith(SUFFIXES)]


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
    start = _start(path)
    return start[:2] == b"\x1f\x8b" or (start[:2] == b"\0\0" and start[2:3] in _IDX_TYPES)


def _start(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(12)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _kind(path: Path) -> str:
    """What a file is that Pillow does not know, as far as its first bytes tell, for a message."""
    start = _start(path)
    if start[4:8] != b"ftyp":
        return "is neither an image that Pillow knows nor an IDX file of images"
    brand = start[8:12].decode("ascii", "replace").strip("\0 ")
    kind = "HEIC" if brand in _HEIC else "AVIF" if brand.startswith("avi") else f"MP4 ({brand})"
    return f"is {kind}, which is not read here; convert it to JPEG or PNG"


def _open(path: Path, invert: bool, mode: str) -> Image.Image:
    """Read an image file, composited on black."""
    try:
        with decode.opened(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
            assert image is not None  # only with in_place=True
    except Image.UnidentifiedImageError:
        raise DataError(f"{path} {_kind(path)}") from None
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

"""Decodes pictures of any kind to 8-bit grey or RGB, upright.

OpenCV decodes what most sets are made of, JPEGs in grey or YCbCr and plain 8-bit PNGs; Pillow all
else, and what OpenCV refuses. Both let other threads run meanwhile. A JPEG that becomes much
smaller is decoded at a half, a quarter or an eighth of its size, which costs a part of the work.
"""

from __future__ import annotations

import functools
import io
import math
import struct
import warnings
from typing import Any, NamedTuple, Optional, Tuple

import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")

_PNG = b"\x89PNG\r\n\x1a\n"
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
_ORIENTATION = 0x0112  # the tag in Exif
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "La", "RGBa", "LAB", "HSV")
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
# Those of Pillow's that are decoded. EPS is not among them: it runs Ghostscript.
_KINDS = (
    "BMP",
    "DIB",
    "GIF",
    "ICO",
    "JPEG",
    "JPEG2000",
    "PNG",
    "PPM",
    "PSD",
    "TGA",
    "TIFF",
    "WEBP",
)
_MOST_MILLIONS = 150  # of pixels: half a gigabyte; no common camera makes more
_PARTS = {1: 0, 2: 16, 4: 32, 8: 64}  # of IMREAD_REDUCED_GRAYSCALE_2 and so on


class UnreadableError(ValueError):
    """The content is no picture, or a damaged one; says why."""


class Header(NamedTuple):
    """What the beginning of a picture tells."""

    width: int  # upright, as the two others
    height: int
    scales: bool  # whether it can be decoded at a part of its size
    plain: bool  # whether OpenCV decodes it faithfully


@functools.lru_cache(maxsize=1)
def opencv() -> Any:
    """OpenCV, in one thread: workers are threads already."""
    import cv2  # late: takes 0.1 s, and only sets of pictures need it

    cv2.setNumThreads(1)
    return cv2


def header(content: bytes) -> Header:
    """The header of a picture.

    Raises:
        UnreadableError: there is none.
    """
    found: Optional[Header] = None
    try:
        if content[:2] == b"\xff\xd8":
            found = _jpeg_header(content)
        elif content[:8] == _PNG:
            found = _png_header(content)
    except (struct.error, IndexError):
        pass  # cut short: Pillow says how
    if found is not None:
        _check_size(found.width, found.height)
        return found
    image = _opened(content)
    width, height = image.size
    if image.getexif().get(_ORIENTATION, 1) > 4:
        width, height = height, width
    return Header(width, height, scales=False, plain=False)


def decode(content: bytes, about: Header, channels: int, part: int = 1) -> np.ndarray:
    """The pixels of a picture, upright; transparency is black.

    Args:
        about: its header.
        channels: 3 for RGB, 1 for grey.
        part: 1, 2, 4 or 8: decode at 1 / part of the size, if ``about.scales``.

    Returns:
        uint8 (H, W, 3) or (H, W).

    Raises:
        UnreadableError: it is cut short or damaged.
    """
    if about.plain:
        cv2 = opencv()
        flags = _PARTS[part] | (cv2.IMREAD_COLOR_RGB if channels == 3 else 0)
        try:
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
        except cv2.error:
            pixels = None
        if pixels is not None:
            return np.asarray(pixels)
    return _by_pillow(content, "RGB" if channels == 3 else "L")


def part_for(about: Header, scale: float) -> int:
    """The part at which to decode what becomes ``scale`` times smaller; never a smaller one."""
    part = 1
    while about.scales and 2 * part in _PARTS and 2 * part <= scale:
        part *= 2
    return part


def upright(image: Any, mode: str) -> Any:
    """A Pillow image turned as its Exif says, on black, in ``mode`` RGB or L.

    Raises:
        UnreadableError: its pixels are no grey levels or colours of 1, 8 or 16 bits.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT:
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.mode not in _EIGHT_BIT:
        raise UnreadableError(
            f"it has pixels of Pillow's mode {image.mode}; convert it to grey or RGB of 8 bits"
        )
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.composite(image, Image.new("RGBA", image.size, "black"), image)
    if image.mode in ("LAB", "HSV", "CMYK", "YCbCr"):
        image = image.convert("RGB")
    return image.convert(mode)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """16-bit grey levels, in whichever integer type, as uint8."""
    return (np.clip(values, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)


def _by_pillow(content: bytes, mode: str) -> np.ndarray:
    image = _opened(content)
    try:
        image.load()
        return np.asarray(upright(image, mode))
    except UnreadableError:
        raise
    except Exception as error:  # its decoders raise all kinds of exceptions on broken files
        raise UnreadableError(f"it cannot be decoded: {_one_line(error)}") from None


def opened(file: Any) -> Any:
    """The picture in a file, or at a path, by Pillow, not decoded yet.

    Raises:
        UnreadableError: it has too many pixels.
        Exception: Pillow's, where it is no picture.
    """
    pillow = _pillow()
    try:
        image = pillow.open(file, formats=_KINDS)
    except pillow.DecompressionBombError:  # twice the size of which Pillow warns
        _check_size()
    _check_size(*image.size)
    return image


@functools.lru_cache(maxsize=1)
def _pillow() -> Any:
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # see opened()
    return Image


def _check_size(width: float = math.inf, height: float = math.inf) -> None:
    if width * height > _MOST_MILLIONS * 1e6:
        size = f" ({width} x {height})" if width < math.inf else ""
        raise UnreadableError(
            f"it has more than the {_MOST_MILLIONS} million pixels that are decoded{size}; make it "
            "smaller"
        )


def _opened(content: bytes) -> Any:
    if not content:
        raise UnreadableError("it is empty")
    try:
        return opened(io.BytesIO(content))
    except UnreadableError:
        raise
    except _pillow().UnidentifiedImageError:
        raise UnreadableError("it is no picture that Pillow knows") from None
    except Exception as error:
        raise UnreadableError(f"it cannot be decoded: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _png_header(content: bytes) -> Header:
    width, height, bits, kind = struct.unpack_from(">IIBB", content, 16)
    # Grey or RGB; a colour may be marked as transparent, and Exif may turn it.
    before_pixels = content[: content.index(b"IDAT")] if b"IDAT" in content else content
    special = b"tRNS" in before_pixels or b"eXIf" in before_pixels
    if special or bits != 8 or kind not in (0, 2):
        raise struct.error  # to Pillow
    return Header(width, height, scales=False, plain=True)


def _jpeg_header(content: bytes) -> Optional[Header]:
    """By the markers before the pixels; None if they are not found."""
    turned, position = 1, 2
    while True:
        if content[position] != 0xFF:
            return None
        marker = content[position + 1]
        if marker == 0xFF or marker in _WITHOUT_LENGTH:
            position += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", content, position + 2)
        if marker in _START_OF_FRAME:
            bits, height, width, parts = struct.unpack_from(">BHHB", content, position + 4)
            if turned > 4:
                width, height = height, width
            plain = bits == 8 and parts in (1, 3) and bool(width and height)
            return Header(width, height, scales=plain, plain=plain) if plain else None
        if marker == 0xE1 and content[position + 4 : position + 10] == b"Exif\0\0":
            turned = _orientation(content[position + 10 : position + 2 + length])
        position += 2 + length


def _orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in a block of Exif; 1 where it tells none."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for number in range(count):
            entry: Tuple[int, ...] = struct.unpack_from(
                f"{order}HHIH", exif, start + 2 + 12 * number
            )
            if entry[0] == _ORIENTATION:
                return entry[3]
    except struct.error:
        pass
    return 1

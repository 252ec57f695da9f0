"""Decodes pictures of any kind to 8-bit grey or RGB, upright.

OpenCV decodes what most sets are made of, JPEGs in grey or YCbCr and plain 8-bit PNGs; Pillow all
else, and what OpenCV refuses. Both let other threads run meanwhile. A JPEG that becomes much
smaller is decoded at a half, a quarter or an eighth of its size, which costs a part of the work.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from typing import Any, Iterator, Mapping, NamedTuple

import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")

_ORIENTATION = 0x0112  # the tag in Exif
_BITS, _PHOTOMETRIC, _EXTRA = 258, 262, 338  # tags of a TIFF: bits of a level, 0 for white, bands
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "La", "RGBa", "LAB", "HSV")
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
# Those of Pillow's that are decoded. EPS is not among them: it runs Ghostscript.
_KINDS = ("JPEG", "PNG", "BMP", "GIF", "ICO", "JPEG2000", "PPM", "PSD", "TGA", "TIFF", "WEBP")
_MOST_MILLIONS = 150  # of pixels: half a gigabyte; no common camera makes more
_NO_PICTURE = "it is no picture that Pillow knows; convert it to JPEG or PNG, or give a dataset"
_BANDS = "it has bands that are neither colours nor opacity; leave them out, or give a dataset"
_TOO_LARGE = f"it has more than the {_MOST_MILLIONS} million pixels that are read; make it smaller"
_PARTS = {1: 0, 2: 16, 4: 32, 8: 64}  # of IMREAD_REDUCED_GRAYSCALE_2 and so on


class UnreadableError(ValueError):
    """The content is no picture, or a damaged one; says why."""


class Header(NamedTuple):
    """What the beginning of a picture tells."""

    width: int  # upright, as the two others
    height: int
    turned: int  # how it is stored, 1 to 8 as Exif has it
    scales: bool  # whether it can be decoded at a part of its size
    plain: bool  # whether OpenCV decodes it faithfully


@functools.lru_cache(maxsize=1)
def opencv() -> Any:
    """OpenCV, in one thread: workers are threads already."""
    import cv2  # late: takes 0.1 s, and only sets of pictures need it

    cv2.setNumThreads(1)
    return cv2


def header(content: bytes) -> Header:
    """The header of a picture; raises UnreadableError where there is none."""
    image = _opened(content)
    (width, height), turned = image.size, _turned(image, content)
    if turned > 4:
        width, height = height, width
    jpeg = image.format in ("JPEG", "MPO")
    # OpenCV knows no colour that is transparent, and tells nothing of levels of 16 bits.
    simple = image.format == "PNG" and "transparency" not in image.info and content[24] <= 8
    plain = image.mode in ("L", "RGB") and (jpeg or simple)
    return Header(width, height, turned, scales=jpeg and plain, plain=plain)


def decode(
    content: bytes, about: Header, channels: int, part: int = 1, invert: bool = False
) -> np.ndarray:
    """The pixels of a picture, upright, uint8 (H, W, 3) or (H, W); transparency is black.

    UnreadableError says that it is cut short or damaged.

    Args:
        about: its header.
        channels: 3 for RGB, 1 for grey.
        part: 1, 2, 4 or 8: decode at 1 / part of the size, if ``about.scales``.
        invert: negate it, but for what is transparent.
    """
    if about.plain:
        cv2 = opencv()
        # It would find another orientation than Pillow in some files, and the header another size.
        flags = _PARTS[part] | cv2.IMREAD_IGNORE_ORIENTATION
        flags |= cv2.IMREAD_COLOR_RGB if channels == 3 else 0
        with contextlib.suppress(cv2.error):
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
            if pixels is not None:
                return _upright(255 - pixels if invert else pixels, about.turned)
    return np.asarray(by_pillow(content, "RGB" if channels == 3 else "L", invert))


def part_for(about: Header, scale: float) -> int:
    """The part at which to decode what becomes ``scale`` times smaller; never a smaller one."""
    return max(part for part in _PARTS if part == 1 or (about.scales and part <= scale))


def _upright(pixels: np.ndarray, turned: int) -> np.ndarray:
    if turned > 4:
        pixels = pixels.swapaxes(0, 1)
    if turned in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turned in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _turned(image: Any, content: bytes) -> int:
    """How Exif says that a Pillow image is turned, 1 to 8; 1 if it does not, or is damaged."""
    if image.format == "PNG" and b"eXIf" not in content:  # or Pillow decodes all to look for it
        return 1
    try:
        turned = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises any: SyntaxError for what is no TIFF
        return 1
    return turned if turned in range(1, 9) else 1


def by_pillow(content: bytes, mode: str, invert: bool = False) -> Any:
    """A picture as a Pillow image, turned as its Exif says, on black, in ``mode`` RGB or L.

    ``invert`` negates it, but for what is transparent. Raises UnreadableError where it is none, or
    damaged, or its pixels are no grey levels or colours of 1, 8, 12 or 16 bits.
    """
    from PIL import Image, ImageOps

    image = _opened(content)
    with _explained():
        tags = image.tag_v2 if image.format == "TIFF" else {}
        deep = max(tags.get(_BITS, [0])) > 8 or (image.format == "PNG" and content[24] > 8)
        image.load()
        if _turned(image, content) > 1:
            image = ImageOps.exif_transpose(image)
        if image.mode in _SIXTEEN_BIT:
            image = Image.fromarray(_eight_bits(np.asarray(image), tags))
        elif deep and image.mode[:3] == "RGB":  # Pillow has kept the upper half of each level
            _check_levels(0, 256 * int(np.asarray(image)[..., :3].max()) + 255)
        if image.mode not in _EIGHT_BIT:
            raise UnreadableError(
                f"it has pixels of Pillow's mode {image.mode}; convert it to grey or RGB of 8 bits"
            )
        opacity = None
        if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            opacity = image.getchannel("A")
        if image.mode in ("LAB", "HSV", "CMYK", "YCbCr"):
            image = image.convert("RGB")
        image = image.convert(mode)
        if invert:
            image = ImageOps.invert(image)
        return Image.composite(image, Image.new(mode, image.size), opacity) if opacity else image


def _eight_bits(levels: np.ndarray, tags: Mapping[int, Any]) -> np.ndarray:
    """Grey levels of 16 bits, or of 12 where the tags of a TIFF say so, as uint8."""
    bits = 12 if tags.get(_BITS) == (12,) else 16
    _check_levels(int(levels.min()), int(levels.max()) << (16 - bits))
    shown = (levels >> (bits - 8)).astype(np.uint8)
    return 255 - shown if tags.get(_PHOTOMETRIC) == 0 else shown  # Pillow does so with 8 bits


def _check_levels(low: int, high: int) -> None:
    """Refuse what is not of 16 bits, or would be black: 12 bits, say, of which no file tells."""
    if low < 0 or high > 65535 or 0 < high < 4096:
        raise UnreadableError(
            f"its levels are {low} to {high}, of which 8 bits would show little: those of 16 bits "
            "are 0 to 65535; bring them to this range, or to 8 bits, alike in all pictures"
        )


def _opened(content: bytes) -> Any:
    """The picture by Pillow, not decoded yet."""
    if not content:
        raise UnreadableError("it is empty")
    with _explained():
        image = _pillow().open(io.BytesIO(content), formats=_KINDS)
        if image.format == "TIFF" and 0 in image.tag_v2.get(_EXTRA, ()):
            raise UnreadableError(_BANDS)
    if image.width * image.height > _MOST_MILLIONS * 1e6:
        raise UnreadableError(_TOO_LARGE)
    return image


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn whatever Pillow raises, which is any exception, into an UnreadableError."""
    pillow = _pillow()
    try:
        yield
    except UnreadableError:
        raise
    except pillow.UnidentifiedImageError:
        raise UnreadableError(_NO_PICTURE) from None
    except pillow.DecompressionBombError:  # at twice the size of which it warns
        raise UnreadableError(_TOO_LARGE) from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableError(f"it cannot be decoded: {reason}") from None


@functools.lru_cache(maxsize=1)
def _pillow() -> Any:
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # see _opened()
    return Image

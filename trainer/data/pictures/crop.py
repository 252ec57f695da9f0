"""Which part of a picture is cut out, brought to the net's size, and how its colours change."""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence

import numpy as np

from ...config import Data
from . import decode
from .decode import opencv

TRIES = 4  # at a random part that lies within the picture
DRAWS = 2 * TRIES + 2 + 3  # random numbers of a sample: area and aspect, place, colours
_MIDDLE = 0.875  # of the shorter side, in evaluation: 224 of 256
_LOG_ASPECT = math.log(4 / 3)
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue


class Box(NamedTuple):
    """A part of a picture, in pixels of its full size."""

    left: float
    top: float
    width: float
    height: float


def middle(width: int, height: int, settings: Data) -> Box:
    """The square that remains of a picture whose shorter side is scaled to ``data.resize``."""
    size = settings.image_size
    assert size is not None  # checked by the settings
    share = _MIDDLE if settings.resize is None else size / settings.resize
    side = share * min(width, height)
    return Box((width - side) / 2, (height - side) / 2, side, side)


def shorter_side(settings: Data) -> int:
    """The pixels that the shorter side of a picture is scaled to, in evaluation."""
    assert settings.image_size is not None
    return settings.resize or round(settings.image_size / _MIDDLE)


def at_random(width: int, height: int, settings: Data, draw: Sequence[float]) -> Box:
    """A part of random area and aspect, as Szegedy et al. (arXiv:1409.4842) train with.

    ``draw`` is ``DRAWS`` numbers in [0, 1).
    """
    smallest, largest = settings.crop_area
    for attempt in range(TRIES):
        share, aspect = draw[2 * attempt], draw[2 * attempt + 1]
        area = (smallest + (largest - smallest) * share) * width * height
        ratio = math.exp((2 * aspect - 1) * _LOG_ASPECT)
        wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if wide <= width and high <= height:
            break
    wide, high = min(wide, width), min(high, height)
    x, y = draw[2 * TRIES], draw[2 * TRIES + 1]
    return Box(x * (width - wide), y * (height - high), wide, high)


def cut(
    content: bytes, settings: Data, draw: Sequence[float] = (), invert: bool = False
) -> np.ndarray:
    """Decode a picture, cut a part out and bring it to the size of the net.

    ``draw`` is random numbers of the sample in training, empty in evaluation; ``invert`` is as for
    :func:`decode.decode`. Returns uint8 (side, side, 3) or (side, side); raises UnreadableError
    where the picture is damaged, or no picture.
    """
    about, side = decode.header(content), settings.image_size
    assert side is not None
    size, random = (about.width, about.height), len(draw) and settings.random_crop
    box = at_random(*size, settings, draw) if random else middle(*size, settings)
    part = decode.part_for(about, min(box.width, box.height) / side)
    pixels = decode.decode(content, about, settings.channels, part, invert)
    pixels = _resized(_within(pixels, box, about), side)
    if len(draw) and settings.color_jitter:
        pixels = _jittered(pixels, settings.color_jitter, draw[-3:])
    return pixels


def _within(pixels: np.ndarray, box: Box, about: decode.Header) -> np.ndarray:
    """The pixels of ``box``, at least one in each direction; decoded at whichever size."""
    high, wide = pixels.shape[0] / about.height, pixels.shape[1] / about.width
    top = min(int(box.top * high), pixels.shape[0] - 1)
    left = min(int(box.left * wide), pixels.shape[1] - 1)
    below = max(top + 1, round((box.top + box.height) * high))
    right = max(left + 1, round((box.left + box.width) * wide))
    return pixels[top:below, left:right]


def _resized(pixels: np.ndarray, side: int) -> np.ndarray:
    cv2 = opencv()
    # Linear interpolation skips pixels where a picture becomes less than half as large.
    much_smaller = min(pixels.shape[:2]) >= 2 * side
    how = cv2.INTER_AREA if much_smaller else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, (side, side), interpolation=how))


def _jittered(pixels: np.ndarray, share: float, draw: Sequence[float]) -> np.ndarray:
    """Brightness, contrast and saturation changed, in this order, by up to ``share`` each.

    All three are linear in the colours of a pixel, so one product with a matrix does them.
    """
    cv2 = opencv()
    light, contrast, saturation = (1 + share * (2 * number - 1) for number in draw)
    means = cv2.mean(pixels)
    if pixels.ndim == 2:
        grey = light * (1 - contrast) * means[0]
        return np.asarray(cv2.transform(pixels, np.array([[light * contrast, grey]])))
    grey = light * (1 - contrast) * float(np.dot(_LUMA, means[:3]))
    colours = saturation * np.eye(3) + (1 - saturation) * np.array([_LUMA] * 3)
    matrix = np.concatenate([light * contrast * colours, np.full((3, 1), grey)], axis=1)
    return np.asarray(cv2.transform(pixels, matrix))

"""From uint8 images to normalised float32 arrays: augmentation, resizing, normalisation.

Everything is vectorized over a batch in NumPy, which releases the GIL.
"""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..config import Data
from . import sharding


class Transform:
    """From sample indices to a normalised float32 array.

    Args:
        images: uint8 (N, H, W), or (N, H, W, C) of C channels; kept, not copied.
        settings: the transforms; augmentation applies only if ``training``.
        seed: seed of the augmentation.
    """

    def __init__(self, images: np.ndarray, settings: Data, seed: int, training: bool):
        self._settings = settings
        self._seed = seed
        self._random = training and bool(settings.pad_crop or settings.flip or settings.erase)
        self._images = images[:, None] if images.ndim == 3 else np.moveaxis(images, -1, 1)
        channels, height, width = self._images.shape[1:]
        side = settings.image_size
        self._shape = (channels, height, width) if side is None else (channels, side, side)
        self._resize = (
            BilinearResize(height, width, side)
            if side is not None and (side, side) != (height, width)
            else None
        )
        self._scale = np.float32(1 / (255 * settings.std))
        self._shift = np.float32(-settings.mean / settings.std)

    @property
    def shape(self) -> Tuple[int, int, int]:
        """(channels, height, width) of the output."""
        return self._shape

    def __call__(
        self, indices: np.ndarray, epoch: int = 0, out: Optional[np.ndarray] = None
    ) -> np.ndarray:
        """float32 (len(indices), channels, height, width), written to ``out`` if given."""
        if out is None:
            out = np.empty((len(indices), *self.shape), np.float32)
        pixels = self._augment(indices, epoch) if self._random else self._images[indices]
        if self._resize is None:
            _normalise(pixels, self._scale, self._shift, out=out)
        else:
            planes = _normalise(pixels, self._scale, self._shift).reshape(-1, *pixels.shape[2:])
            self._resize(planes, out=out.reshape(-1, *out.shape[2:]))
        return out

    def _augment(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        settings = self._settings
        draw = sharding.uniform(self._seed, epoch, indices, draws=8)
        pixels = self._images[indices]
        if settings.pad_crop:
            pixels = _crop(pixels, settings.pad_crop, draw[:, :2])
        if settings.flip:
            mirrored = draw[:, 2] < 0.5
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        if settings.erase:
            _erase(pixels, draw[:, 3:], settings)
        return pixels


def _crop(pixels: np.ndarray, pad: int, draw: np.ndarray) -> np.ndarray:
    """Random crop, to the original size, of images zero-padded by ``pad`` on each side."""
    count, channels, height, width = pixels.shape
    # Not np.pad, whose overhead in Python counts at this size.
    padded = np.zeros((count, channels, height + 2 * pad, width + 2 * pad), pixels.dtype)
    padded[..., pad : pad + height, pad : pad + width] = pixels
    # windows[i, :, y, x] is image i shifted by (y - pad, x - pad): a view, nothing is copied.
    windows = sliding_window_view(padded, (height, width), (2, 3))  # type: ignore[call-overload]
    y, x = (draw * (2 * pad + 1)).astype(np.int64).T
    return np.asarray(windows[np.arange(count), :, y, x])


def _erase(pixels: np.ndarray, draw: np.ndarray, settings: Data) -> None:
    """Blank a random rectangle, of 2 to 33 % of the area and aspect 0.3 to 3.3, in some images.

    Zhong et al., "Random erasing data augmentation", AAAI 2020, filled with the mean; a rectangle
    that crosses the edge is clipped instead of drawn again.
    """
    height, width = pixels.shape[2:]
    area = (0.02 + 0.31 * draw[:, 1]) * height * width
    aspect = 0.3 * (3.3 / 0.3) ** draw[:, 2]
    half_height = np.minimum(np.sqrt(area * aspect), height)[:, None] / 2
    half_width = np.minimum(np.sqrt(area / aspect), width)[:, None] / 2
    rows = np.abs(np.arange(height) + 0.5 - draw[:, 3:4] * height) <= half_height
    columns = np.abs(np.arange(width) + 0.5 - draw[:, 4:5] * width) <= half_width
    chosen = draw[:, 0] < settings.erase
    blank = chosen[:, None, None] & rows[:, :, None] & columns[:, None, :]
    np.copyto(pixels, round(255 * settings.mean), where=blank[:, None])


def _normalise(
    pixels: np.ndarray, scale: np.float32, shift: np.float32, out: Optional[np.ndarray] = None
) -> np.ndarray:
    out = np.multiply(pixels, scale, out=out, dtype=np.float32)
    return np.add(out, shift, out=out)


class BilinearResize:
    """Resizes float32 (N, height, width) to (N, side, side).

    Bilinear between pixel centres with edges replicated, as OpenCV's INTER_LINEAR and so Gluon's
    ``Resize``.
    """

    def __init__(self, height: int, width: int, side: int):
        distance = _centres(width, side) - np.arange(width)[:, None]
        weights = np.maximum(0, 1 - np.abs(distance)).astype(np.float32)
        # Most weights are zero: each half of the new columns needs about half of the old ones.
        middle = side // 2
        halves = [(0, middle), (middle, side)] if middle else [(0, side)]
        self._halves = [_without_zeros(weights, start, stop) for start, stop in halves]
        centres = _centres(height, side)
        self._above = centres.astype(np.intp)  # the row of the input at or above each centre
        share = (centres - self._above).astype(np.float32)
        # Expanded to full width: NumPy multiplies by a broadcast column far more slowly.
        self._share = np.repeat(share[:, None], side, axis=1)

    def __call__(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """Write resized ``pixels``, float32 (N, height, width), to ``out``, (N, side, side)."""
        height, width = pixels.shape[1:]
        rows = pixels.reshape(-1, width)  # one product is faster than N
        wide = np.empty((len(rows), out.shape[2]), np.float32)
        for old, new, weights in self._halves:
            np.matmul(rows[:, old], weights, out=wide[:, new])
        wide = wide.reshape(-1, height, out.shape[2])
        rise = np.empty_like(wide)  # from each row to the one below; none from the last
        np.subtract(wide[:, 1:], wide[:, :-1], out=rise[:, :-1])
        rise[:, -1] = 0
        # With mode="raise" np.take would buffer its output.
        np.take(wide, self._above, axis=1, out=out, mode="clip")
        risen = np.take(rise, self._above, axis=1, mode="clip")
        risen *= self._share
        out += risen


def _without_zeros(weights: np.ndarray, start: int, stop: int) -> Tuple[slice, slice, np.ndarray]:
    """Columns ``start`` to ``stop`` of a matrix, less all-zero rows: (rows, columns, part)."""
    rows = np.flatnonzero(weights[:, start:stop].any(axis=1))
    used, columns = slice(rows[0], rows[-1] + 1), slice(start, stop)
    return used, columns, np.ascontiguousarray(weights[used, columns])


def _centres(size: int, new_size: int) -> np.ndarray:
    """The centres of the new pixels in coordinates of the old ones, from 0; float64 (new_size,)."""
    return np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)

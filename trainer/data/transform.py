"""From uint8 images to normalised float32 arrays: augmentation, resizing, normalisation.

Everything is vectorized over a batch in NumPy, which releases the GIL.
"""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..config import Data
from ..config.data_settings import PerChannel
from . import sharding
from .idx_file import DataError

DRAWS = 8  # random numbers of a sample that are taken here


class PixelTransform:
    """From pixels of one size to a normalised float32 array.

    Args:
        shape: (channels, height, width) of the pixels.
        settings: the transforms; augmentation applies only if ``training``.
        seed: seed of the augmentation.

    Raises:
        DataError: the settings normalise another number of channels.
    """

    def __init__(self, shape: Tuple[int, int, int], settings: Data, seed: int, training: bool):
        self._settings = settings
        self._seed = seed
        self._random = training and bool(settings.pad_crop or settings.flip or settings.erase)
        channels, height, width = shape
        side = settings.image_size
        #: (channels, height, width) of the output.
        self.shape = (channels, height, width) if side is None else (channels, side, side)
        self._resize = (
            BilinearResize(height, width, side)
            if side is not None and (side, side) != (height, width)
            else None
        )
        mean, std = (_by_channel(value, channels) for value in (settings.mean, settings.std))
        self._scale = np.asarray(1 / (255 * std), np.float32)
        self._shift = np.asarray(-mean / std, np.float32)
        self._blank = np.rint(255 * mean)  # what erase fills with, before it is normalised

    def __call__(self, pixels: np.ndarray, rows: np.ndarray, epoch: int, out: np.ndarray) -> None:
        """Write the transformed ``pixels`` to ``out``.

        Args:
            pixels: uint8 (B, channels, height, width), of the samples ``rows``; may be changed.
            out: float32 (B, *self.shape).
        """
        if self._random:
            pixels = self._augment(pixels, rows, epoch)
        if self._resize is None:
            _normalise(pixels, self._scale, self._shift, out=out)
        else:
            planes = _normalise(pixels, self._scale, self._shift).reshape(-1, *pixels.shape[2:])
            self._resize(planes, out=out.reshape(-1, *out.shape[2:]))

    def _augment(self, pixels: np.ndarray, rows: np.ndarray, epoch: int) -> np.ndarray:
        settings = self._settings
        draw = sharding.uniform(self._seed, epoch, rows, draws=DRAWS)
        if settings.pad_crop:
            pixels = _crop(pixels, settings.pad_crop, draw[:, :2])
        if settings.flip:
            mirrored = draw[:, 2] < 0.5
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        if settings.erase:
            _erase(pixels, draw[:, 3:], settings.erase, self._blank)
        return pixels


class Transform:
    """From indices of samples in memory to a normalised float32 array.

    Args:
        images: uint8 (N, H, W), or (N, H, W, C) of C channels; kept, not copied.
        settings, seed, training: as for :class:`PixelTransform`.
    """

    def __init__(self, images: np.ndarray, settings: Data, seed: int, training: bool):
        self._images = planes(images)
        self._pixels = PixelTransform(planes_shape(images.shape[1:]), settings, seed, training)

    @property
    def shape(self) -> Tuple[int, int, int]:
        """(channels, height, width) of the output."""
        return self._pixels.shape

    def __call__(
        self, indices: np.ndarray, epoch: int = 0, out: Optional[np.ndarray] = None
    ) -> np.ndarray:
        """float32 (len(indices), channels, height, width), written to ``out`` if given."""
        if out is None:
            out = np.empty((len(indices), *self.shape), np.float32)
        self._pixels(self._images[indices], indices, epoch, out)
        return out


def planes(images: np.ndarray) -> np.ndarray:
    """A view of ``images``, (N, H, W) or (N, H, W, C), as (N, C, H, W)."""
    return images[:, None] if images.ndim == 3 else np.moveaxis(images, -1, 1)


def planes_shape(shape: Sequence[int]) -> Tuple[int, int, int]:
    """(channels, height, width) of images of a ``shape`` (H, W) or (H, W, C)."""
    height, width, channels = (*shape, 1)[:3]
    return channels, height, width


def as_images(data: np.ndarray, settings: Data) -> np.ndarray:
    """Normalised ``data``, float32 (N, C, H, W), as images to look at, uint8 (N, H, W[, C])."""
    mean, std = (_by_channel(value, data.shape[1]) for value in (settings.mean, settings.std))
    pixels = np.clip(np.rint(255 * (data * std + mean)), 0, 255).astype(np.uint8)
    return pixels[:, 0] if data.shape[1] == 1 else np.moveaxis(pixels, 1, -1)


def _by_channel(value: PerChannel, channels: int) -> np.ndarray:
    """float64, of shape () for all channels alike, or (channels, 1, 1)."""
    if isinstance(value, tuple) and len(value) != channels:
        raise DataError(
            f"data.mean and data.std hold {len(value)} numbers, the images have {channels} "
            f"channel{'s' * (channels > 1)}; give one number, or one for each channel"
        )
    return np.reshape(value, (-1, 1, 1)) if isinstance(value, tuple) else np.asarray(value)


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


def _erase(pixels: np.ndarray, draw: np.ndarray, share: float, fill: np.ndarray) -> None:
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
    chosen = draw[:, 0] < share
    blank = chosen[:, None, None] & rows[:, :, None] & columns[:, None, :]
    np.copyto(pixels, fill, where=blank[:, None], casting="unsafe")


def _normalise(
    pixels: np.ndarray, scale: np.ndarray, shift: np.ndarray, out: Optional[np.ndarray] = None
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

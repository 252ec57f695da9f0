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
from .augment import trivial
from .idx_file import DataError
from .pictures.decode import opencv

DRAWS = 8  # random numbers of a sample that are taken here
_TRIVIAL = 2**32  # added to the seed of TrivialAugment, which has numbers of its own


class PixelTransform:
    """From pixels of one ``shape``, (channels, height, width), to a normalised float32 array.

    Augmented, by what is drawn from ``seed``, only if ``training``. Raises DataError where the
    settings normalise, or augment, another number of channels.
    """

    def __init__(self, shape: Tuple[int, int, int], settings: Data, seed: int, training: bool):
        self._settings = settings
        self._seed = seed
        self._random = training and bool(
            settings.pad_crop or settings.flip or settings.trivial_augment or settings.erase
        )
        channels, height, width = shape
        if settings.trivial_augment and channels not in (1, 3):
            raise DataError(
                f"data.trivial_augment is for images in grey or colour; these have {channels} "
                "channels: set data.trivial_augment=false"
            )
        side = settings.image_size
        #: (channels, height, width) of the output.
        self.shape = (channels, height, width) if side is None else (channels, side, side)
        self._resizes = self.shape != shape
        mean, std = (_by_channel(value, channels) for value in (settings.mean, settings.std))
        self._scale = np.asarray(1 / (255 * std), np.float32)
        self._shift = np.asarray(-mean / std, np.float32)
        self._blank = np.rint(255 * mean)  # what erase fills with, before it is normalised

    def __call__(self, pixels: np.ndarray, rows: np.ndarray, epoch: int, out: np.ndarray) -> None:
        """Write the transformed ``pixels`` of the samples ``rows`` to ``out``.

        From uint8 (B, channels, height, width), which may be changed, to float32 (B, *self.shape).
        """
        if self._random:
            pixels = self._augment(pixels, rows, epoch)
        if self._resizes:
            _resize(_normalise(pixels, self._scale, self._shift), out)
        else:
            _normalise(pixels, self._scale, self._shift, out)

    def _augment(self, pixels: np.ndarray, rows: np.ndarray, epoch: int) -> np.ndarray:
        settings = self._settings
        draw = sharding.uniform(self._seed, epoch, rows, draws=DRAWS)
        if settings.pad_crop:
            pixels = _crop(pixels, settings.pad_crop, draw[:, :2])
        if settings.flip:
            mirrored = draw[:, 2] < 0.5
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        if settings.trivial_augment:
            draws = sharding.uniform(self._seed + _TRIVIAL, epoch, rows, trivial.DRAWS)
            for image, numbers in zip(pixels, draws):
                flat = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
                image[:] = planes(trivial.augmented(np.ascontiguousarray(flat), numbers)[None])[0]
        if settings.erase:
            _erase(pixels, draw[:, 3:], settings.erase, self._blank)
        return pixels


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


def _resize(pixels: np.ndarray, out: np.ndarray) -> None:
    """Bilinear between pixel centres with edges replicated, as Gluon's ``Resize``.

    From float32 (B, channels, height, width) to (B, channels, side, side).
    """
    cv2, side = opencv(), out.shape[-1]
    old, new = (images.reshape(-1, *images.shape[2:]) for images in (pixels, out))
    for plane, resized in zip(old, new):
        cv2.resize(plane, (side, side), dst=resized, interpolation=cv2.INTER_LINEAR)

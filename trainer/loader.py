"""Batches on the device: gather, augment, resize, normalise, ahead of the model.

The uint8 images are kept in memory once. Everything is vectorized over a batch in NumPy, which
releases the GIL, so one background thread keeps ahead of the device.
"""

from __future__ import annotations

import functools
import queue
import threading
from typing import Any, Iterator, NamedTuple, Optional, Tuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from . import sharding
from .config import Data
from .placement import Place, on_host
from .resize import BilinearResize


class Batch(NamedTuple):
    """One rank's shard of a global batch."""

    data: Any  # float32 (rows, channels, height, width)
    label: Any  # float32 (rows,): Gluon's losses take class indices as floats
    samples: int  # all rows; 0 if the shard is empty and the one row a placeholder
    global_samples: int  # in the global batch, over all ranks
    micro_batches: Tuple[int, ...] = ()  # rows of each, to be processed in turn; (): all at once


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


class _Arrays:
    """Makes (data, label) of given samples, on the device."""

    def __init__(self, transform: Transform, labels: np.ndarray, place: Place):
        self.transform = transform
        self._labels = labels.astype(np.float32)
        self._place = place

    def __call__(self, rows: np.ndarray, epoch: int = 0) -> Tuple[Any, Any]:
        shape = (len(rows), *self.transform.shape)
        data = self._place(shape, lambda out: self.transform(rows, epoch, out))
        return data, self._place(rows.shape, lambda out: np.take(self._labels, rows, out=out))


class TrainLoader:
    """This rank's shard of every global batch, epoch after epoch.

    Args:
        images, labels: the whole training set, uint8 (N, H, W[, C]) and integer (N,).
        parts: micro-batches of each global batch.
        place: allocates and fills the arrays, e.g. ``placement.on_device(ctx)``.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        settings: Data,
        *,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
        place: Place = on_host,
    ):
        self._arrays = _Arrays(Transform(images, settings, seed, training=True), labels, place)
        self._samples = len(labels)
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._rank, self._world_size, self._parts = rank, world_size, parts
        self._prefetch = settings.prefetch

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return sharding.steps_per_epoch(self._samples, self._global_batch_size)

    @property
    def shape(self) -> Tuple[int, int, int]:
        """(channels, height, width) of a sample."""
        return self._arrays.transform.shape

    def from_step(self, step: int, last_step: int) -> Iterator[Batch]:
        """The batches of steps ``step`` to ``last_step - 1``, counted from the start of the run."""
        return prefetched(self._batches(step, last_step), self._prefetch)

    def _batches(self, step: int, last_step: int) -> Iterator[Batch]:
        order_of = functools.lru_cache(maxsize=1)(
            lambda epoch: sharding.epoch_order(self._samples, self._seed, epoch)
        )
        for current in range(step, last_step):
            epoch, batch = divmod(current, self.steps_per_epoch)
            indices = sharding.global_batch(order_of(epoch), self._global_batch_size, batch)
            shards = sharding.micro_shards(indices, self._parts, self._rank, self._world_size)
            own = np.concatenate(shards)
            # A rank with an empty shard still takes part in collectives: it runs a placeholder.
            rows = own if len(own) else indices[:1]
            sizes = tuple(map(len, shards))
            yield Batch(*self._arrays(rows, epoch), len(own), len(indices), sizes)


class EvalLoader:
    """This rank's shard of a set, once, in order, without augmentation.

    ``global_samples`` of a batch is its own size: evaluation has no global batches.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        settings: Data,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        place: Place = on_host,
    ):
        self._arrays = _Arrays(Transform(images, settings, 0, training=False), labels, place)
        self._indices = sharding.shard(np.arange(len(labels)), rank, world_size)
        self._batch_size = batch_size
        self._prefetch = settings.prefetch

    def __iter__(self) -> Iterator[Batch]:
        return prefetched(self._batches(), self._prefetch)

    def _batches(self) -> Iterator[Batch]:
        for start in range(0, len(self._indices), self._batch_size):
            rows = self._indices[start : start + self._batch_size]
            yield Batch(*self._arrays(rows), len(rows), len(rows))


def prefetched(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """``batches``, made by a background thread that is up to ``depth`` + 1 batches ahead.

    Errors in the thread are raised here. Leaving the iterator early stops the thread.
    """
    ready: queue.Queue[Tuple[Optional[Batch], Optional[BaseException]]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(batch: Optional[Batch], error: Optional[BaseException] = None) -> None:
        while not stopped.is_set():
            try:
                return ready.put((batch, error), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        stopped.set()
        thread.join()

"""Bilinear resizing of whole batches: along rows by a matrix product, along columns by lerp."""

from __future__ import annotations

from typing import Tuple

import numpy as np


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

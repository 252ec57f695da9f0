"""Bilinear resizing of whole batches: columns by a matrix product, rows by interpolation."""

from __future__ import annotations

import numpy as np


class BilinearResize:
    """From (N, height, width) to (N, side, side), float32.

    Bilinear between pixel centres, edges repeated: what OpenCV's INTER_LINEAR and so Gluon's
    ``Resize`` do.
    """

    def __init__(self, height: int, width: int, side: int):
        columns = _centres(width, side)[:, None] - np.arange(width)
        self._columns = np.maximum(0, 1 - np.abs(columns)).T.astype(np.float32)
        centres = _centres(height, side)
        self._above = centres.astype(np.intp)  # the row of the input at or above each centre
        share = (centres - self._above).astype(np.float32)
        # As wide as an image: numpy multiplies by a column of shares far more slowly.
        self._share = np.repeat(share[:, None], side, axis=1)

    def __call__(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """Write resized ``pixels`` into ``out``."""
        height, width = pixels.shape[1:]
        wide = pixels.reshape(-1, width) @ self._columns  # one product is faster than N
        wide = wide.reshape(-1, height, wide.shape[1])
        rise = np.zeros_like(wide)  # from each row to the one below; none from the last
        np.subtract(wide[:, 1:], wide[:, :-1], out=rise[:, :-1])
        # A mode other than "raise" takes without a buffer between.
        np.take(wide, self._above, axis=1, out=out, mode="clip")
        risen = np.take(rise, self._above, axis=1, mode="clip")
        risen *= self._share
        out += risen


def _centres(size: int, new_size: int) -> np.ndarray:
    """Where the centres of new pixels lie among those of the old, numbered from 0."""
    return np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)

"""Bilinear resizing of whole batches, by matrix products."""

from __future__ import annotations

from typing import Iterator, Tuple

import numpy as np

_ROWS = 12  # of the output in one product: few, so that they need a small part of the input's


class BilinearResize:
    """From (N, height, width) to (N, side, side), float32.

    Bilinear between pixel centres, edges repeated: what OpenCV's INTER_LINEAR and so Gluon's
    ``Resize`` do.
    """

    def __init__(self, height: int, width: int, side: int):
        self._columns = _weights(width, side).T.copy()
        self._bands = list(_bands(_weights(height, side)))

    def __call__(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """Write resized ``pixels`` into ``out``."""
        height, width = pixels.shape[1:]
        wide = pixels.reshape(-1, width) @ self._columns  # one product is faster than N
        wide = wide.reshape(-1, height, wide.shape[1])
        for rows, needed, weights in self._bands:
            np.matmul(weights, wide[:, needed], out=out[:, rows])


def _bands(weights: np.ndarray) -> Iterator[Tuple[slice, slice, np.ndarray]]:
    """Rows of the output, the rows of the input that they need, and the weights of those."""
    for start in range(0, len(weights), _ROWS):
        rows = slice(start, start + _ROWS)
        used = np.flatnonzero(weights[rows].any(axis=0))
        needed = slice(used[0], used[-1] + 1)
        yield rows, needed, weights[rows, needed].copy()


def _weights(size: int, new_size: int) -> np.ndarray:
    """The matrix (new_size, size), float32, that resizes a column of pixels."""
    centres = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(size))).astype(np.float32)

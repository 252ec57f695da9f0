"""Images in memory as a batch, as the loader makes it."""

from __future__ import annotations

import numpy as np

from trainer.config import Data
from trainer.data.sources.base import ArraySource


class Transform:
    """From indices of ``images``, uint8 (N, H, W[, C]), to float32 (B, channels, height, width)."""

    def __init__(self, images: np.ndarray, settings: Data, seed: int, training: bool):
        source = ArraySource(images, np.zeros(len(images), int))
        self._fill = source.filler(settings, seed, training)
        self.shape = self._fill.shape

    def __call__(self, rows: np.ndarray, epoch: int = 0) -> np.ndarray:
        data = np.empty((len(rows), *self.shape), np.float32)
        self._fill(rows, epoch, data, np.empty(len(rows), np.float32))
        return data

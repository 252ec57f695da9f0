"""mixup and CutMix: each training sample is mixed with another of its global batch.

Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018; Yun et al., "CutMix:
regularization strategy to train strong classifiers with localizable features", ICCV 2019. Each
sample has a share of its own, where those draw one for a batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

_STREAM = 2**32  # added to the seed: other numbers than those of the order of an epoch


class Mixed(NamedTuple):
    """What is mixed into the samples of a rank's batch, (B,) float32 each on the device."""

    label: Any  # of the other sample
    share: Any  # of the sample's own label and pixels, 0 to 1


class Mix(NamedTuple):
    """How the samples of a global batch are mixed."""

    partners: np.ndarray  # int64 (N,): a permutation of the batch
    shares: np.ndarray  # float32 (N,): what stays of each sample
    boxes: np.ndarray  # int64 (N, 4): top, bottom, left, right of what CutMix replaces
    cut: np.ndarray  # bool (N,): by CutMix, not mixup

    def __call__(self, sample: int, own: np.ndarray, other: np.ndarray, out: np.ndarray) -> None:
        """Write sample number ``sample`` of the batch, ``own`` mixed with ``other``, to ``out``.

        All float32 (channels, height, width).
        """
        if self.cut[sample]:
            top, bottom, left, right = self.boxes[sample]
            out[:] = own
            out[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        else:
            np.multiply(own, self.shares[sample], out=out)
            out += (1 - self.shares[sample]) * other


def draw(
    mixup: float, cutmix: float, seed: int, step: int, count: int, height: int, width: int
) -> Mix:
    """Draw the mix of the global batch of ``step``, of ``count`` samples, from (seed, step).

    ``mixup`` and ``cutmix`` are parameters of the symmetric beta distribution of shares; 0: not
    that one. With both, each sample takes either with probability 1/2.
    """
    random = np.random.Generator(np.random.Philox(key=[_STREAM + seed, step]))
    partners = random.permutation(count)
    cut = random.random(count) < (0.5 if mixup and cutmix else float(cutmix > 0))
    blended, kept = (random.beta(a or 1, a or 1, count) for a in (mixup, cutmix))
    half_sides = np.sqrt(1 - kept)[:, None] * (height, width) / 2
    centres = random.random((count, 2)) * (height, width)
    ends = np.clip(np.rint([centres - half_sides, centres + half_sides]), 0, (height, width))
    low, high = ends.astype(np.int64)
    left_over = 1 - (high - low).prod(axis=1) / (height * width)
    boxes = np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1)
    return Mix(partners, np.where(cut, left_over, blended).astype(np.float32), boxes, cut)

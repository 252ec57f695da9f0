"""Which training samples are kept out of training, to choose by."""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np

from .idx_file import DataError

_STREAM = 2**64 - 1  # of random numbers: no epoch has this number


def split(
    size: int, labels: Optional[np.ndarray], share: float, seed: int
) -> Tuple[np.ndarray, np.ndarray]:
    """The samples to train on, and those to validate on; each sorted, int64.

    The same share of each class is drawn from the seed; at least one sample of it, and never all.

    Args:
        labels: integer (size,); None where they are not known: then the samples count as one class.

    Raises:
        DataError: nothing would remain of a part.
    """
    draw = np.random.Generator(np.random.Philox(key=[seed, _STREAM]))
    shuffled = draw.permutation(size)
    kept_out = np.zeros(size, bool)
    of_class = np.zeros(size, np.int64) if labels is None else labels[shuffled]
    for label in np.unique(of_class):
        members = shuffled[of_class == label]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        kept_out[members[:count]] = True
    train, validation = np.flatnonzero(~kept_out), np.flatnonzero(kept_out)
    if not len(train) or not len(validation):
        raise DataError(
            f"data.validation is {share:g}, and no class of the training set has two images"
        )
    return train, validation

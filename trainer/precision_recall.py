"""Precision-recall curves from counts that are summed over ranks, and so exact.

Probabilities are counted in 127 buckets, those of TensorBoard's PR curves.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

THRESHOLDS = 127  # i / 126; the most that TensorBoard reads


def count_scores(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Histogram of the predicted probabilities of each class, for its own samples and all others.

    Args:
        probabilities: float (B, K), 0 to 1.
        labels: integer (B,).

    Returns:
        int64 (2, K, 127): at [1, k, i] the samples of class k, at [0, k, i] the others, whose
        probability of class k is at least i / 126 and below (i + 1) / 126.
    """
    classes = probabilities.shape[1]
    # As in TensorBoard: in the probabilities' own precision, rounded down.
    bucket = np.floor(probabilities * (THRESHOLDS - 1)).astype(np.int64).clip(0, THRESHOLDS - 1)
    own = labels[:, np.newaxis] == np.arange(classes)
    place = (own * classes + np.arange(classes)) * THRESHOLDS + bucket
    counts = np.bincount(place.ravel(), minlength=2 * classes * THRESHOLDS)
    return counts.reshape(2, classes, THRESHOLDS)


class Curve(NamedTuple):
    """One class at each threshold: counts, int64 (127,); precision and recall, float64 (127,)."""

    true_positives: np.ndarray
    false_positives: np.ndarray
    true_negatives: np.ndarray
    false_negatives: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


def curve(counts: np.ndarray, label: int) -> Curve:
    """The curve of class ``label``, from the sum over all batches of :func:`count_scores`."""
    false, true = (np.cumsum(row[::-1])[::-1] for row in counts[:, label])
    return Curve(
        true_positives=true,
        false_positives=false,
        true_negatives=false[0] - false,
        false_negatives=true[0] - true,
        precision=true / np.maximum(true + false, 1),
        recall=true / max(true[0], 1),
    )

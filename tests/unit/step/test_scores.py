"""Curves compared to a direct count, and sums of parts to the whole."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.step.evaluation import THRESHOLDS, count_scores, curve


def scores(samples: int, classes: int, seed: int) -> tuple:
    random = np.random.RandomState(seed)
    logits = random.normal(0, 3, (samples, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return probabilities.astype(np.float32), random.randint(0, classes, samples)


@given(samples=st.integers(1, 40), classes=st.integers(2, 5), seed=st.integers(0, 99))
def test_a_curve_is_what_counting_at_each_threshold_gives(samples, classes, seed):
    probabilities, labels = scores(samples, classes, seed)
    counts = count_scores(probabilities, labels)
    for label in range(classes):
        found, own = curve(counts, label), labels == label
        for i in range(THRESHOLDS):
            taken = np.floor(probabilities[:, label] * 126) >= i
            expected = (
                (taken & own).sum(),
                (taken & ~own).sum(),
                (~taken & ~own).sum(),
                (~taken & own).sum(),
            )
            assert tuple(int(column[i]) for column in found[:4]) == expected
            assert found.recall[i] == expected[0] / max(own.sum(), 1)


def test_parts_add_up_to_the_whole():
    probabilities, labels = scores(50, 3, 1)
    parts = count_scores(probabilities[:20], labels[:20]) + count_scores(
        probabilities[20:], labels[20:]
    )
    np.testing.assert_array_equal(parts, count_scores(probabilities, labels))
    assert parts.sum() == 50 * 3


def test_certain_and_undefined_probabilities_have_a_bucket():
    with np.errstate(invalid="ignore"):
        counts = count_scores(np.array([[0.0, 1.0], [np.nan, np.nan]]), np.array([1, 0]))
    assert counts.sum() == 4 and counts[1, 1, THRESHOLDS - 1] == 1

"""Evaluation: every test sample exactly once, on any number of ranks."""

from __future__ import annotations

from typing import Dict, Iterable, List, NamedTuple, Optional

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import dist
from ..data.loader import Batch
from .loss import Loss, cross_entropy
from .step import eval_step


def evaluate(
    net: gluon.Block, batches: Iterable[Batch], num_classes: int, loss_of: Loss = cross_entropy
) -> Evaluation:
    """Run ``net`` over this rank's shard of a set and sum over ranks; collective.

    Results are read one batch late, so that loading, forward and reading overlap, and memory does
    not grow with the set.
    """
    loss_sum, count = 0.0, 0
    confusion = np.zeros((num_classes, num_classes), np.int64)
    score_counts = np.zeros((2, num_classes, THRESHOLDS), np.int64)
    pending: Optional[List[mx.nd.NDArray]] = None

    def take(results: Optional[List[mx.nd.NDArray]]) -> None:
        nonlocal loss_sum, count, score_counts
        if results is None:
            return
        loss, predicted, label, probability = (array.asnumpy() for array in results)
        loss_sum += loss.astype(np.float64).sum()
        count += len(loss)
        label = label.astype(np.int64)
        pairs = label * num_classes + predicted.astype(np.int64)
        confusion.reshape(-1)[:] += np.bincount(pairs, minlength=num_classes**2)
        score_counts += count_scores(probability, label)

    for batch in batches:
        loss, logits = eval_step(net, batch, loss_of)
        probability = mx.nd.softmax(logits, axis=-1)
        current = [loss, logits.argmax(axis=-1), batch.label, probability]
        take(pending)
        pending = current
    take(pending)
    sums = dist.allreduce_sum(np.array([loss_sum, count], np.float64), "evaluation.sums")
    confusion = dist.allreduce_sum(confusion, "evaluation.confusion")
    score_counts = dist.allreduce_sum(score_counts, "evaluation.scores")
    total = int(sums[1])
    return Evaluation(
        loss=float(sums[0] / total),
        accuracy=float(np.trace(confusion) / total),
        confusion=confusion,
        samples=total,
        score_counts=score_counts,
    )


class Evaluation(NamedTuple):
    """Metrics of one pass over a set, over all ranks."""

    loss: float  # mean cross entropy, in nats, or that of the loss given to fit
    accuracy: float  # share of samples, 0 to 1
    confusion: np.ndarray  # int64 (K, K): samples of class row predicted as class column
    samples: int
    # int64 (2, K, 127), see count_scores; None if not counted
    score_counts: Optional[np.ndarray] = None

    @property
    def class_accuracy(self) -> np.ndarray:
        """Recall of each class, float64 (K,); NaN for a class without samples."""
        seen = self.confusion.sum(axis=1)
        return np.where(seen > 0, np.diag(self.confusion) / np.maximum(seen, 1), np.nan)

    def scalars(self) -> Dict[str, float]:
        """The metrics to log, by name."""
        return {"loss": self.loss, "accuracy": self.accuracy}


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

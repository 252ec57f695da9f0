"""Evaluation: every test sample exactly once, on any number of ranks."""

from __future__ import annotations

from typing import Iterable, List, Optional

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import dist
from .loader import Batch
from .metrics import Evaluation
from .precision_recall import THRESHOLDS, count_scores
from .step import Loss, cross_entropy, eval_step


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

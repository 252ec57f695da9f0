"""Evaluation: every test sample exactly once, on any number of ranks."""

from __future__ import annotations

import functools
import re
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import dist
from ..config import Evaluate
from ..data.loader import Batch
from ..errors import ConfigError, show
from .loss import Loss, check_values, cross_entropy
from .step import eval_step

# By name: maps scores (B, K) and labels (B,) to a number for each sample (B,); the mean is told.
Metrics = Mapping[str, Loss]

_TAKEN = ("loss", "accuracy", "step", "set", "samples", "event", "time")  # in logs


def check_metrics(metrics: Any, scores: int, ctx: mx.Context) -> None:
    """Refuse metrics that are not functions of scores and labels, by name. Raises ConfigError: a
    name cannot be logged, or its function does not give one value per sample.
    """
    if not isinstance(metrics, Mapping):
        raise ConfigError(f"metrics are {show(metrics)}; give a mapping of names to functions")
    for name, metric in metrics.items():
        if not re.fullmatch(r"\w+", str(name)) or name in _TAKEN:
            raise ConfigError(
                f"a metric's name is {show(name)}; it must be a word, none of {', '.join(_TAKEN)}"
            )
        check_values(f"metric {name}", metric, scores, ctx)


def built_in(settings: Evaluate, num_classes: int) -> Metrics:
    """The metrics that ``settings`` ask for. Raises ConfigError: ``evaluate.top_k`` says nothing
    about a net with so few scores.
    """
    if settings.top_k is None:
        return {}
    if settings.top_k >= num_classes:
        raise ConfigError(
            f"evaluate.top_k is {settings.top_k}, and the net has {num_classes} scores, among "
            "which the right one always is; take fewer, or evaluate.top_k=null"
        )
    return {f"top{settings.top_k}_accuracy": functools.partial(in_top, k=settings.top_k)}


def in_top(scores: mx.nd.NDArray, label: mx.nd.NDArray, k: int) -> mx.nd.NDArray:
    """1 where the label's score is among the ``k`` highest, else 0: (B, K) and (B,) -> (B,)."""
    return mx.nd.pick(mx.nd.topk(scores, k=k, ret_typ="mask"), label)


def evaluate(
    net: gluon.Block,
    batches: Iterable[Batch],
    num_classes: int,
    loss_of: Loss = cross_entropy,
    metrics: Optional[Metrics] = None,
    flip: bool = False,
) -> Evaluation:
    """Run ``net`` over this rank's shard of a set and sum over ranks; collective.

    Results are read one batch late, so that loading, forward and reading overlap, and memory does
    not grow with the set.
    """
    functions = [loss_of, *(metrics or {}).values()]
    sums, count = np.zeros(len(functions)), 0
    confusion = np.zeros((num_classes, num_classes), np.int64)
    score_counts = np.zeros((2, num_classes, THRESHOLDS), np.int64)
    pending: Optional[List[mx.nd.NDArray]] = None

    def take(results: Optional[List[mx.nd.NDArray]]) -> None:
        nonlocal sums, count, score_counts
        if results is None:
            return
        predicted, label, probability, *values = (array.asnumpy() for array in results)
        sums += [value.astype(np.float64).sum() for value in values]
        count += len(label)
        label = label.astype(np.int64)
        np.add.at(confusion, (label, predicted.astype(np.int64)), 1)
        score_counts += count_scores(probability, label)

    for batch in batches:
        values, logits = eval_step(net, batch, functions, flip)
        probability = mx.nd.softmax(logits, axis=-1)
        current = [logits.argmax(axis=-1), batch.label, probability, *values]
        take(pending)
        pending = current
    take(pending)
    sums = dist.allreduce_sum(np.append(sums, count), "evaluation.sums")
    confusion = dist.allreduce_sum(confusion, "evaluation.confusion")
    score_counts = dist.allreduce_sum(score_counts, "evaluation.scores")
    total = int(sums[-1])  # 0 where all batches were left out, by a stop
    loss, *means = (sums[:-1] / max(total, 1)).tolist()
    return Evaluation(
        loss=loss,
        accuracy=float(np.trace(confusion) / max(total, 1)),
        confusion=confusion,
        samples=total,
        score_counts=score_counts,
        metrics=dict(zip(metrics or {}, means)),
    )


class Evaluation(NamedTuple):
    """Metrics of one pass over a set, over all ranks."""

    loss: float  # mean cross entropy, in nats, or that of the loss given to fit
    accuracy: float  # share of samples, 0 to 1
    confusion: np.ndarray  # int64 (K, K): samples of class row predicted as class column
    samples: int
    # int64 (2, K, 127), see count_scores; None if not counted
    score_counts: Optional[np.ndarray] = None
    metrics: Mapping[str, float] = {}

    @property
    def class_accuracy(self) -> np.ndarray:
        """Recall of each class, float64 (K,); NaN for a class without samples."""
        seen = self.confusion.sum(axis=1)
        return np.where(seen > 0, np.diag(self.confusion) / np.maximum(seen, 1), np.nan)

    def scalars(self) -> Dict[str, float]:
        """The metrics to log, by name."""
        return {"loss": self.loss, "accuracy": self.accuracy, **self.metrics}


THRESHOLDS = 127  # i / 126; the most that TensorBoard reads


def count_scores(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Histogram of the predicted probabilities of each class, for its own samples and all others.

    Of float (B, K), 0 to 1, and integers (B,): int64 (2, K, 127), at [1, k, i] the samples of class
    k, at [0, k, i] the others, whose probability of class k is at least i / 126 and below
    (i + 1) / 126.
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
    precision, recall = true / np.maximum(true + false, 1), true / max(true[0], 1)
    return Curve(true, false, false[0] - false, true[0] - true, precision, recall)

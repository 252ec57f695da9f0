"""A rank of ``benchmarks/scaling_validation.py``: measures steps and the inputs of the model.

Every rank measures the layers of the seed's ResNet-18 and a step without its allreduce while the
others do the same, then the ways of summing, alternating. Rank 0 writes JSON to the file named.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from benchmarks import layer_times
from trainer import batch_norm, dist
from trainer.config.schema import BUCKET_MB
from trainer.dist import half_sum
from trainer.model import resnet18
from trainer.step.gradients import gradients
from trainer.step.optimizer import gluon_trainer

BATCH = 16
ROUNDS = 7
SMALL_SUMS = 50
WAYS: Dict[str, Dict[str, Any]] = {
    "one bucket": {"bucket_mb": 1000.0},
    "buckets": {"bucket_mb": BUCKET_MB},
    "fp16": {"bucket_mb": BUCKET_MB, "fp16": True},
    "sync norm": {"bucket_mb": BUCKET_MB, "sync": True},
}


class Step:
    """A training step over ranks, in parts."""

    def __init__(self, bucket_mb: float, fp16: bool = False, sync: bool = False):
        mx.random.seed(0)
        self._net = net = resnet18()
        net.initialize(mx.init.Xavier())
        self._data = mx.nd.random.normal(shape=(BATCH, 1, 28, 28))
        self._label = mx.nd.zeros(BATCH)
        net(self._data)
        self.norms = len(batch_norm.layers_of(net))
        if sync:
            batch_norm.convert_sync_batch_norm(net)
        net.hybridize(static_alloc=True)
        self._loss = gluon.loss.SoftmaxCrossEntropyLoss()
        sgd = mx.optimizer.create("sgd", learning_rate=0.001, momentum=0.9)
        self.trainer = gluon_trainer(net.collect_params(), sgd, fp16, bucket_mb)

    def whole(self) -> None:
        """A whole step."""
        self._record()
        self.trainer.allreduce_grads()
        self.update()

    def alone(self) -> None:
        """A step without the allreduce."""
        self._record()
        self.update()

    def backward(self) -> None:
        """Forward and backward."""
        self._record()
        mx.nd.waitall()

    def update(self) -> None:
        """The optimizer's update."""
        self.trainer.update(BATCH)
        mx.nd.waitall()

    def _record(self) -> None:
        with autograd.record():
            loss = self._loss(self._net(self._data), self._label)
        loss.backward()


def seconds(
    work: Callable[[], Any], rounds: int, before: Callable[[], Any] = lambda: None
) -> float:
    """Median over rounds of what the slowest rank takes; the first round is left out.

    All ranks begin together, after ``before``.
    """
    taken: List[float] = []
    for _ in range(rounds + 1):
        before()
        dist.barrier()
        began = time.perf_counter()
        work()
        taken.append(max(dist.gather_objects(time.perf_counter() - began)))
    return statistics.median(taken[1:])


def probe(gradients: List[mx.nd.NDArray]) -> Dict[str, float]:
    """Seconds of Horovod's cycle, of a small sum, and of one of as many numbers as ``gradients``.

    They begin at any time of a cycle. The numbers are in one bucket; in float16 the casts are part
    of it.
    """
    small = mx.nd.zeros(64)
    large = mx.nd.zeros(-(-sum(gradient.size for gradient in gradients) // 64) * 64)
    half = half_sum.summing(large, "half", half_sum.everywhere())

    def sums(enqueue: Callable[[], Any]) -> None:
        enqueue()
        mx.nd.waitall()

    return {
        "cycle": float(os.environ["HOROVOD_CYCLE_TIME"]) / 1000,
        "small_sum": seconds(lambda: sums(lambda: dist.allreduce_sum_(small, "small")), SMALL_SUMS),
        "large_sum": seconds(lambda: sums(lambda: dist.allreduce_sum_(large, "large")), ROUNDS),
        "half_sum": seconds(lambda: sums(half), ROUNDS),
    }


def norm_sum(synced: Step, local: Step) -> float:
    """Seconds that each synced norm takes longer in one direction, within forward and backward."""
    longer = seconds(synced.backward, ROUNDS) - seconds(local.backward, ROUNDS)
    return max(0.0, longer) / (2 * synced.norms)


def main() -> None:
    """Measure, and write the mean over ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--probe", action="store_true", help="measure sums and casts too")
    args = parser.parse_args()
    dist.init()
    steps = {way: Step(**settings) for way, settings in WAYS.items()}
    data = mx.nd.random.normal(shape=(BATCH, 1, 28, 28))
    layers_of_net = layer_times.prepared(resnet18(), data)
    dist.barrier()
    layers = layer_times.measure(layers_of_net, data, ROUNDS)
    group = steps["one bucket"]
    own = {
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "compute": seconds(group.alone, ROUNDS),
        "update": seconds(group.update, ROUNDS, before=group.backward),
        **{way: seconds(step.whole, args.rounds) for way, step in steps.items()},
    }
    if args.probe:
        # Right after the steps: a norm's sum takes longer the more other sums Horovod has made.
        longer = norm_sum(steps["sync norm"], group)
        own["probe"] = {"norm_sum": longer, **probe(gradients(group.trainer))}
    ranks = dist.gather_objects(own)
    if dist.is_root():
        args.path.write_text(json.dumps(mean(ranks)))
    dist.shutdown()


def mean(values: List[Any]) -> Any:
    """The elementwise mean of nested lists and mappings of floats; other values from the first."""
    first = values[0]
    if isinstance(first, dict):
        return {key: mean([value[key] for value in values]) for key in first}
    if isinstance(first, (list, tuple)):
        return [mean(list(items)) for items in zip(*values)]
    return float(np.mean(values)) if isinstance(first, float) else first


if __name__ == "__main__":
    main()

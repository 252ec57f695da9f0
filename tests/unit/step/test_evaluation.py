"""Evaluation counts each sample once and agrees with a sample-by-sample reference."""

from __future__ import annotations

import tracemalloc

import mxnet as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mxnet.gluon import nn

from trainer import dist
from trainer.config import Data, Evaluate
from trainer.data.loader import EvalLoader
from trainer.data.sources.base import ArraySource
from trainer.dist.array_memory import on_device
from trainer.errors import ConfigError
from trainer.step.evaluation import built_in, check_metrics, evaluate

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(0, 256, (37, 4, 4), np.uint8)
LABELS = RANDOM.randint(0, 5, 37)


@pytest.fixture(scope="module")
def net():
    mx.random.seed(0)
    net = nn.HybridSequential()
    net.add(nn.Conv2D(3, 3, in_channels=1), nn.BatchNorm(in_channels=3), nn.Dense(5, in_units=12))
    net.initialize(mx.init.Normal(1))
    net.hybridize()
    return net


def loader(batch_size: int, **kwargs) -> EvalLoader:
    place = on_device(mx.cpu())
    return EvalLoader(
        ArraySource(IMAGES, LABELS), Data(), batch_size=batch_size, place=place, **kwargs
    )


def reference(net) -> tuple:
    """One sample at a time, in float64."""
    losses, confusion = [], np.zeros((5, 5), np.int64)
    for image, label in zip(IMAGES, LABELS):
        x = ((image / 255 - Data().mean) / Data().std)[None, None]
        logits = net(mx.nd.array(x)).asnumpy()[0].astype(np.float64)
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])
        confusion[label, logits.argmax()] += 1
    return np.mean(losses), confusion


@settings(max_examples=10)
@given(batch_size=st.integers(1, 40))
def test_evaluation_is_exact_for_any_batch_size(net, batch_size):
    loss, confusion = reference(net)
    evaluation = evaluate(net, loader(batch_size), 5)
    assert evaluation.samples == 37
    assert evaluation.confusion.dtype == np.int64
    assert evaluation.confusion.tolist() == confusion.tolist()
    assert evaluation.accuracy == np.trace(confusion) / 37
    assert evaluation.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 3, 50])
def test_shares_of_ranks_add_up(net, monkeypatch, world_size):
    """What each rank hands to the collective sums up to what one rank has; some have nothing."""
    from trainer import dist

    handed = {"evaluation.sums": 0, "evaluation.confusion": 0, "evaluation.scores": 0}

    def gather(values, name):
        handed[name] = handed[name] + values
        return np.ones_like(values)  # stands in for the sum that a real collective would give

    monkeypatch.setattr(dist, "allreduce_sum", gather)
    for rank in range(world_size):
        evaluate(net, loader(4, rank=rank, world_size=world_size), 5)
    loss, confusion = reference(net)
    assert handed["evaluation.confusion"].tolist() == confusion.tolist()
    assert handed["evaluation.sums"].tolist() == pytest.approx([37 * loss, 37], rel=1e-5)
    monkeypatch.undo()
    alone = evaluate(net, loader(4), 5).score_counts
    assert handed["evaluation.scores"].tolist() == alone.tolist() and alone.sum() == 37 * 5


def test_a_batch_takes_no_second_matrix_of_all_classes(monkeypatch):
    """Of a thousand classes each would take 8 MB, of 20,000 three gigabytes."""
    # The sum over ranks, at the end, is a copy.
    monkeypatch.setattr(dist, "allreduce_sum", lambda values, name: values)
    classes = 1500
    net = nn.Dense(classes, in_units=16)
    net.initialize()
    batches = list(loader(10))
    evaluate(net, batches, classes)
    tracemalloc.start()
    confusion = evaluate(net, batches, classes).confusion
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert confusion.sum() == 37 and peak < 1.7 * confusion.nbytes


def test_moves_nothing_in_the_net(net):
    def values():
        return [p.data().asnumpy() for p in net.collect_params().values()]

    before = values()
    evaluate(net, loader(8), 5)
    assert all((a == b).all() for a, b in zip(before, values()))


def test_batches_may_be_any_iterable(net):
    assert evaluate(net, list(loader(10)), 5).samples == 37
    assert evaluate(net, iter(loader(10)), 5).samples == 37


def test_error_in_the_batches_is_passed_on(net):
    def batches():
        yield from list(loader(10))[:2]
        raise OSError("bad record")

    with pytest.raises(OSError, match="bad record"):
        evaluate(net, batches(), 5)


def margin(scores: mx.nd.NDArray, label: mx.nd.NDArray) -> mx.nd.NDArray:
    """How far the label's score is below the highest."""
    return scores.max(axis=-1) - mx.nd.pick(scores, label)


def test_metrics_are_means_over_all_samples(net):
    metrics = {**built_in(Evaluate(top_k=2), 5), "margin": margin}
    found = evaluate(net, loader(8), 5, metrics=metrics)
    pixels = (IMAGES / 255 - Data().mean) / Data().std
    scores = net(mx.nd.array(pixels[:, None])).asnumpy().astype(np.float64)
    own = scores[np.arange(37), LABELS]
    above = (scores > own[:, None]).sum(axis=1)
    assert found.metrics["top2_accuracy"] == (above < 2).mean() > found.accuracy
    assert found.metrics["margin"] == pytest.approx((scores.max(axis=1) - own).mean(), rel=1e-5)
    assert list(found.scalars()) == ["loss", "accuracy", "top2_accuracy", "margin"]
    assert found._replace(metrics={}) == evaluate(net, loader(8), 5)._replace(
        confusion=found.confusion, score_counts=found.score_counts
    )


@pytest.mark.parametrize(
    "metrics, named",
    [
        ([margin], "mapping of names"),
        ({"loss": margin}, "none of loss, accuracy"),
        ({"a/b": margin}, "must be a word"),
        ({"far": lambda scores, label: scores}, "metric far gives .* for 2 samples"),
        ({"far": lambda scores: scores}, "metric far cannot take scores"),
    ],
)
def test_what_is_no_metric_is_refused(metrics, named):
    with pytest.raises(ConfigError, match=named):
        check_metrics(metrics, 5, mx.cpu())


def test_a_top_k_that_all_samples_would_be_in_is_refused():
    with pytest.raises(ConfigError, match="evaluate.top_k is 5, and the net has 5 scores"):
        built_in(Evaluate(top_k=5), 5)


def test_flipped_images_share_in_the_scores(net):
    found = evaluate(net, loader(8), 5, flip=True)
    pixels = (IMAGES / 255 - Data().mean) / Data().std
    both = [net(mx.nd.array(x[:, None])).asnumpy() for x in (pixels, pixels[:, :, ::-1])]
    scores = np.mean(both, axis=0, dtype=np.float64)
    losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(37), LABELS]
    assert found.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert found.accuracy == (scores.argmax(axis=1) == LABELS).mean()
    assert abs(found.loss - evaluate(net, loader(8), 5).loss) > 1e-3

"""The update in C++ compared with MXNet's, which it must equal to the last bit."""

from __future__ import annotations

import pickle
from typing import Any, List, Tuple

import mxnet as mx
import numpy as np
import pytest

from trainer.dist.array_memory import address_of
from trainer.native import compile
from trainer.step import momentum

KINDS = [(momentum.SGD, mx.optimizer.SGD), (momentum.NAG, mx.optimizer.NAG)]
SHAPES = [(1,), (7,), (2048,), (2049,), (3, 5, 7, 11), (100, 170)]


def drawn(random: np.random.RandomState, scale: float) -> List[mx.nd.NDArray]:
    return [mx.nd.array(random.normal(size=shape) * scale) for shape in SHAPES]


def updated(kind: Any, seed: int, waiting: bool = True, **arguments: Any) -> List[np.ndarray]:
    """Weights and momenta after three updates with other gradients and learning rates."""
    random = np.random.RandomState(seed)
    lr, wd, rate, scale = random.uniform(0.01, 0.99, 4)
    optimizer = kind(learning_rate=lr, wd=wd, momentum=rate, rescale_grad=scale, **arguments)
    if isinstance(optimizer, momentum.InOnePass):
        optimizer.may_wait = waiting
    optimizer.set_lr_mult({1: 0.5})
    optimizer.set_wd_mult({2: 0.0})
    updater = mx.optimizer.get_updater(optimizer)
    weights = drawn(random, 1)
    for _ in range(3):
        gradients = drawn(random, 10 ** random.uniform(-3, 2))
        if updater.aggregate_updates:
            updater(list(range(len(weights))), gradients, weights)
        else:
            for index, (gradient, weight) in enumerate(zip(gradients, weights)):
                updater(index, gradient, weight)
        optimizer.set_learning_rate(optimizer.learning_rate / 3)
    assert optimizer.num_update == 3
    return [array.asnumpy() for array in (*weights, *updater.states.values())]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("ours", "theirs"), KINDS)
def test_bits_are_those_of_mxnet(
    ours: Any, theirs: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    update = momentum.InOnePass._update
    monkeypatch.setattr(
        momentum.InOnePass, "_update", lambda *given: calls.append(1) or update(*given)
    )
    own = updated(ours, seed)
    assert calls
    for one, other in zip(own, updated(theirs, seed)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rate", [0.0, 0.9])
def test_many_small_arrays_are_updated_in_few_calls_with_the_bits_of_one_each(
    rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, where each call takes time of the host."""
    random = np.random.RandomState(0)
    start = [mx.nd.array(random.normal(size=1 + n)) for n in range(130)]
    gradients = [mx.nd.array(random.normal(size=1 + n)) for n in range(130)]
    calls = []
    for name in ("multi_sgd_update", "multi_sgd_mom_update"):
        original = getattr(mx.optimizer.optimizer, name)

        def counted(*given: Any, original: Any = original, **options: Any) -> Any:
            calls.append(options["num_weights"])
            return original(*given, **options)

        monkeypatch.setattr(mx.optimizer.optimizer, name, counted)
    found = []
    for kind in (momentum.SGD, mx.optimizer.SGD):
        optimizer = kind(learning_rate=0.3, wd=0.01, momentum=rate)
        optimizer.set_wd_mult({index: index % 2 for index in range(130)})
        if kind is mx.optimizer.SGD:
            optimizer.aggregate_num = 1
        updater = mx.optimizer.get_updater(optimizer)
        weights = [weight.copy() for weight in start]
        for _ in range(2):
            if kind is momentum.SGD:
                updater(list(range(130)), gradients, weights)
            else:
                for index in range(130):
                    updater([index], [gradients[index]], [weights[index]])
        states = [state for state in updater.states.values() if state is not None]
        found.append([array.asnumpy().tobytes() for array in (*weights, *states)])
        assert kind is mx.optimizer.SGD or calls == [60, 60, 10] * 2
    assert found[0] == found[1]


@pytest.mark.parametrize(("ours", "theirs"), KINDS)
@pytest.mark.parametrize("without", ["waiting", "a compiler", "momentum", "no clip_gradient"])
def test_mxnet_does_the_rest(
    ours: Any, theirs: Any, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(momentum.InOnePass, "_update")
    if without in ("a compiler", "waiting"):
        if without == "a compiler":
            monkeypatch.setattr(compile, "load", lambda *named: None)
        own = updated(ours, 1, waiting=without != "waiting")
        for one, other in zip(own, updated(theirs, 1)):
            np.testing.assert_array_equal(one, other)
        return
    arguments = {"momentum": {"momentum": 0.0}, "no clip_gradient": {"clip_gradient": 0.1}}[without]
    weights: List[Tuple[mx.nd.NDArray, mx.nd.NDArray]] = []
    for kind in (ours, theirs):
        optimizer = kind(learning_rate=0.1, **{"momentum": 0.9, **arguments})
        optimizer.may_wait = True  # MXNet's own do not know it
        weight = mx.nd.array([1.0, -2.0])
        mx.optimizer.get_updater(optimizer)([0], [mx.nd.array([3.0, 4.0])], [weight])
        weights.append(weight.asnumpy())
    np.testing.assert_array_equal(*weights)


@pytest.mark.parametrize(("kind", "theirs"), KINDS)
def test_gradients_can_be_read_from_elsewhere(kind: Any, theirs: Any) -> None:
    random = np.random.RandomState(1)
    gradients, start = drawn(random, 10), drawn(random, 1)
    found = []
    for one in (kind, theirs):
        updater = mx.optimizer.get_updater(one(learning_rate=0.3, momentum=0.9, wd=0.1))
        updater.optimizer.may_wait = True
        weights = [weight.copy() for weight in start]
        everything = list(range(len(weights)))
        mx.nd.waitall()
        if one is theirs:
            for index in everything:
                many = updater.aggregate_updates
                given = (index, gradients[index], weights[index])
                updater(*([part] for part in given) if many else given)
        else:
            with updater.optimizer.reading(dict(enumerate(map(address_of, gradients)))):
                updater(everything, [mx.nd.zeros_like(g) for g in gradients], weights)
        found.append([array.asnumpy() for array in (*weights, *updater.states.values())])
    for ours, mxnets in zip(*found):
        np.testing.assert_array_equal(ours, mxnets)


def test_sums_are_of_float32_alone() -> None:
    optimizer = momentum.SGD(momentum=0.9)
    weight = mx.nd.ones(2, dtype="float64")
    with optimizer.reading({0: address_of(weight)}), pytest.raises(
        AssertionError, match="sums are float32"
    ):
        mx.optimizer.get_updater(optimizer)([0], [weight], [weight])
    assert pickle.loads(pickle.dumps(optimizer)).momentum == 0.9, "a net may hold its trainer"

"""The update in C++ compared with MXNet's, which it must equal to the last bit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, List, Sequence, Tuple

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon

from trainer.dist.array_memory import address_of
from trainer.mxnet_internals import all_parameters, mark_gradient_as_fresh
from trainer.mxnet_internals import updater as updater_of
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


# -- parameters that one call updates, as on GPUs --------------------------------------------


def trainer_of(
    optimizer: Any, start: List[mx.nd.NDArray], dtypes: Sequence[str] = ("float32",)
) -> gluon.Trainer:
    """Of parameters with those values; the second learns slower, every third does not decay."""
    named = {}
    for number, value in enumerate(start):
        dtype = dtypes[number % len(dtypes)]
        named[str(number)] = parameter = gluon.Parameter(
            str(number), shape=value.shape, dtype=dtype
        )
        parameter.initialize(mx.init.Constant(value), ctx=mx.cpu())
        parameter.lr_mult, parameter.wd_mult = 0.5 if number == 1 else 1, float(number % 3 > 0)
    return gluon.Trainer(named, optimizer, kvstore=None)


def stepped(trainer: gluon.Trainer, steps: int, seed: int) -> List[np.ndarray]:
    """Weights and momenta after some steps, the first of them at a rate of 0."""
    random, rate = np.random.RandomState(seed), trainer.learning_rate
    for step in range(steps):
        trainer.set_learning_rate(rate * step)
        for gradient, parameter in zip(drawn(random, 10), all_parameters(trainer)):
            if parameter.grad_req != "null":
                parameter.list_grad()[0][:] = gradient
                mark_gradient_as_fresh(parameter.list_data()[0])
        trainer.update(1)
    trainer.set_learning_rate(rate)
    weights = [parameter.data() for parameter in all_parameters(trainer)]
    return [array.asnumpy() for array in (*weights, *updater_of(trainer).states.values())]


def nag(kind: Any, **arguments: Any) -> mx.optimizer.Optimizer:
    return kind(learning_rate=0.03, momentum=0.9, wd=0.01, rescale_grad=0.25, **arguments)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> List[Tuple[int, ...]]:
    """On CPUs as on GPUs: the sizes of the weights that each call of the kernel has updated."""
    sizes: List[Tuple[int, ...]] = []
    kernel = mx.nd.nag_mom_update

    def counted(weight: mx.nd.NDArray, *others: Any, **arguments: Any) -> Any:
        sizes.append(weight.shape)
        return kernel(weight, *others, **arguments)

    monkeypatch.setattr(mx.nd, "nag_mom_update", counted)
    monkeypatch.setattr(momentum.NAG, "joined_on", "cpu")
    return sizes


@pytest.mark.parametrize("arguments", [{}, {"clip_gradient": 0.5}])
def test_one_call_updates_all_parameters_with_the_same_factors(
    arguments: Any, calls: List[Any]
) -> None:
    start = drawn(np.random.RandomState(2), 1)
    ours = trainer_of(nag(momentum.NAG, **arguments), start)
    objects = [parameter.data() for parameter in all_parameters(ours)]
    found = stepped(ours, 4, seed=3)
    theirs = stepped(trainer_of(nag(mx.optimizer.NAG, **arguments), start), 4, seed=3)
    assert len(calls) == 4 * 3  # decaying or not, and the slower one
    assert all(a is p.data() for a, p in zip(objects, all_parameters(ours)))
    for one, other in zip(found, theirs):
        np.testing.assert_array_equal(one, other)


def test_parameters_of_two_dtypes_are_joined_once(
    calls: List[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MXNet hands over one dtype after the other in every step."""
    start, joins = drawn(np.random.RandomState(2), 1), []
    join = momentum.NAG._join
    monkeypatch.setattr(momentum.NAG, "_join", lambda *given: joins.append(given) or join(*given))
    found = []
    for kind in (momentum.NAG, mx.optimizer.NAG):
        trainer = trainer_of(nag(kind), start, dtypes=("float32", "float64"))
        found.append(stepped(trainer, 4, seed=3))
    assert len(joins) == 2
    for ours, theirs in zip(*found):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("change", ["factor", "freeze", "new gradients", "load"])
def test_what_changes_in_mid_run_is_noticed(change: str, calls: List[Any], tmp_path: Path) -> None:
    start = drawn(np.random.RandomState(2), 1)
    found = []
    for kind in (momentum.NAG, mx.optimizer.NAG):
        trainer = trainer_of(nag(kind), start)
        stepped(trainer, 2, seed=3)
        parameters = all_parameters(trainer)
        if change == "factor":
            parameters[4].lr_mult = 0.1
        elif change == "freeze":
            parameters[4].grad_req = "null"
        elif change == "new gradients":
            parameters[4].grad_req = "add"
        else:
            states = str(tmp_path / kind.__module__)
            trainer.save_states(states)
            stepped(trainer, 2, seed=5)
            trainer.load_states(states)
        found.append(stepped(trainer, 3, seed=4))
    for ours, theirs in zip(*found):
        np.testing.assert_array_equal(ours, theirs)
    assert len(calls) > 5


def test_a_net_trains_on_with_weights_that_lie_side_by_side(calls: List[Any]) -> None:
    """Also compiled with static memory, which must not go on with where they were before."""
    random = np.random.RandomState(1)
    data, found = mx.nd.array(random.normal(size=(8, 6))), []
    for kind in (momentum.NAG, mx.optimizer.NAG):
        mx.random.seed(1)
        net = gluon.nn.HybridSequential()
        net.add(gluon.nn.Dense(5, activation="relu", in_units=6), gluon.nn.Dense(3, in_units=5))
        net.initialize(mx.init.Xavier())
        net.hybridize(static_alloc=True, static_shape=True)
        trainer = gluon.Trainer(net.collect_params(), nag(kind), kvstore=None)
        for _ in range(4):
            with mx.autograd.record():
                loss = (net(data) ** 2).sum()
            loss.backward()
            trainer.step(8)
        found.append([loss.asnumpy(), *(p.data().asnumpy() for p in all_parameters(trainer))])
        copy = pickle.loads(pickle.dumps(trainer.optimizer))
        assert copy.momentum == 0.9
    assert len(calls) == 4
    for ours, theirs in zip(*found):
        np.testing.assert_array_equal(ours, theirs)

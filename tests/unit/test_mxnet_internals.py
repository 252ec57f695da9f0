"""Each accessor on MXNet's real objects; and that no other file reaches for private names."""

from __future__ import annotations

import ast
import threading
from pathlib import Path
from typing import Iterator

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from trainer import batch_norm
from trainer import mxnet_internals as internals

ROOT = Path(__file__).parents[2]
# What Python's own documentation has of such names: named tuples' methods, and os._exit.
PUBLIC = {"_asdict", "_replace", "_fields", "_make", "_field_defaults", "_exit"}
# launch/ imports nothing of trainer/; cloudpickle's way of restoring a parameter needs these two.
KNOWN = ["launch/local/pickling.py: _data", "launch/local/pickling.py: _init_grad"]


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.endswith("__")


def named(node: ast.AST, *names: str) -> bool:
    """Whether ``node`` is one of these names, or a call of it."""
    node = node.func if isinstance(node, ast.Call) else node
    return isinstance(node, ast.Name) and node.id in names


def reach_ins(source: str) -> Iterator[str]:
    """Private names of anything but ``self``, ``cls`` and ``super()``, in the order of lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names = [] if named(node.value, "self", "cls", "super") else [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and named(node, "getattr", "setattr"):
            names = [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
        else:
            continue
        yield from (name for name in names if is_private(name) and name not in PUBLIC)


def test_private_names_of_others_are_used_in_one_file_alone() -> None:
    """Otherwise nobody can say what a new MXNet breaks: give the name a function there."""
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for package in ("trainer", "launch")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path != ROOT / "trainer" / "mxnet_internals.py"
        for name in reach_ins(path.read_text())
    ]
    assert found == KNOWN


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("trainer._params", ["_params"]),
        ("a._b._c = 1", ["_c", "_b"]),
        ("from mxnet.base import _LIB", ["_LIB"]),
        ("getattr(block, '_cached_op', None)", ["_cached_op"]),
        ("self._mine, cls._ours, super()._its, row._asdict(), os._exit(0), x.__class__", []),
        ("from .. import __version__; getattr(block, name)", []),
    ],
)
def test_reach_ins_are_counted(code: str, names: list) -> None:
    assert list(reach_ins(code)) == names


def small_net() -> gluon.Block:
    net = nn.HybridSequential()
    net.add(nn.Dense(3, in_units=2), nn.BatchNorm(in_channels=3))
    net.initialize()
    return net


def step(net: gluon.Block, trainer: gluon.Trainer) -> None:
    with autograd.record():
        loss = net(mx.nd.ones((4, 2))).sum()
    loss.backward()
    trainer.step(4)


def test_a_trainer_tells_its_parameters_devices_scale_and_counts() -> None:
    net = small_net()
    net[0].bias.grad_req = "null"
    optimizer = mx.optimizer.SGD(momentum=0.9, rescale_grad=0.5)
    trainer = gluon.Trainer(net.collect_params(), optimizer, kvstore=None)
    every = internals.all_parameters(trainer)
    assert sorted(p.name for p in every) == sorted(net.collect_params())
    assert internals.trained_parameters(trainer) == [p for p in every if p.grad_req != "null"]
    assert net[0].bias in every and net[0].bias not in internals.trained_parameters(trainer)
    assert internals.scale(trainer) == 0.5
    assert internals.devices(trainer) == [mx.cpu()]
    assert not internals.has_sparse_gradients(trainer)
    step(net, trainer)
    trained = [every.index(p) for p in internals.trained_parameters(trainer)]
    assert sorted(internals.updater(trainer).states) == trained
    assert internals.update_counts(trainer) == dict.fromkeys(trained, 1)


def test_another_trainer_goes_on_with_the_states_of_the_same_parameters_elsewhere() -> None:
    net = small_net()
    trainer = gluon.Trainer(net.collect_params(), mx.optimizer.SGD(momentum=0.9), kvstore=None)
    step(net, trainer)
    places = {index: -index for index in range(len(internals.all_parameters(trainer)))}
    other = gluon.Trainer(net.collect_params(), mx.optimizer.SGD(momentum=0.9), kvstore=None)
    internals.move_states(trainer, other, places)
    before, after = internals.updater(trainer), internals.updater(other)
    assert after.states == {places[index]: state for index, state in before.states.items()}
    assert after.states_synced.keys() == after.states.keys()
    assert internals.update_counts(other) == dict.fromkeys(after.states, 1)


def test_parameters_are_ordered_alike_whatever_the_process_has_made_before() -> None:
    few, many = small_net(), [small_net() for _ in range(10)][-1]
    shared = nn.HybridSequential()
    shared.add(few, few[0])
    names = sorted(internals.structural_parameters(few))
    for net in (few, many):
        named = internals.structural_parameters(net)
        assert internals.ordered_parameters(net) == [named[name] for name in names]
    assert len(internals.ordered_parameters(shared)) == len(internals.ordered_parameters(few))


def test_sparse_gradients_are_seen() -> None:
    net = nn.Embedding(5, 2, sparse_grad=True)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), "sgd", kvstore=None)
    assert internals.has_sparse_gradients(trainer)


def test_a_trainer_calls_the_allreduce_that_it_is_given() -> None:
    net, calls = small_net(), []
    trainer = gluon.Trainer(net.collect_params(), "sgd", kvstore=None)
    before = internals.allreduce_of(trainer)
    before()
    internals.set_allreduce(trainer, lambda: calls.append("mine"))
    trainer.allreduce_grads()
    step(net, trainer)
    assert calls == ["mine", "mine"]
    assert internals.allreduce_of(trainer) != before


def test_a_gradient_goes_to_the_array_that_it_is_given_and_is_fresh_after_backward() -> None:
    net = small_net()
    weight = net[0].weight
    trainer = gluon.Trainer(net.collect_params(), "sgd", kvstore=None)
    step(net, trainer)
    data = weight.list_data()[0]
    assert not internals.has_fresh_gradient(data), "the update has used it"
    internals.mark_gradient_as_fresh(data)
    assert internals.has_fresh_gradient(data)
    elsewhere = mx.nd.full(weight.shape, 7)
    internals.set_gradient(weight, elsewhere)
    assert internals.has_fresh_gradient(data) and weight.grad() is elsewhere
    assert internals.gradient_or_none(weight) is elsewhere
    with autograd.record():
        loss = net[0](mx.nd.ones((4, 2))).sum()
    loss.backward()
    np.testing.assert_array_equal(elsewhere.asnumpy(), np.full(weight.shape, 4))
    with internals.training_kept([weight]):
        weight.grad_req, weight.lr_mult, weight._trainer = "null", 2.0, None
    assert (weight.grad_req, weight.lr_mult, weight._trainer) == ("write", 1.0, trainer)
    assert internals.gradient_or_none(gluon.Parameter("new", shape=(2,))) is None


def test_a_block_tells_its_parameters_children_and_statistics() -> None:
    net = small_net()
    assert sorted(internals.structural_parameters(net)) == [
        "0.bias",
        "0.weight",
        *(f"1.{name}" for name in ("beta", "gamma", "running_mean", "running_var")),
    ]
    assert internals.own_parameters(net[0]) == {"weight": net[0].weight, "bias": net[0].bias}
    assert internals.children(net) == [net[0], net[1]]
    assert isinstance(net[1], internals.BatchNormBase)
    assert isinstance(nn.BatchNormReLU(), internals.BatchNormBase)
    assert {"axis", "eps", "fix_gamma", "use_global_stats"} <= internals.kernel_arguments(
        net[1]
    ).keys()
    assert internals.is_statistic(net[1].running_mean) and not internals.is_statistic(net[1].gamma)
    internals.mark_as_statistic(net[1].gamma)
    assert internals.is_statistic(net[1].gamma)


def test_a_hybridized_block_tells_its_graph_and_is_hybridized_as_before() -> None:
    net = small_net()
    with internals.compilation_kept([net]):
        net.hybridize(static_alloc=True, static_shape=True)
        assert not internals.has_static_graph(net) and internals.traced_symbol(net) is None
        net(mx.nd.ones((4, 2)))
        assert internals.has_static_graph(net)
        assert len(internals.traced_symbol(net).list_auxiliary_states()) == 2
        internals.clear_graphs([net[0].weight])
        assert not internals.has_static_graph(net) and internals.traced_symbol(net) is None
    net(mx.nd.ones((4, 2)))
    assert internals.traced_symbol(net) is None, "it is not hybridized any more"
    unfinished = gluon.HybridBlock.__new__(gluon.HybridBlock)
    assert not internals.has_static_graph(unfinished)


def test_graphs_around_a_part_of_a_net_are_dropped_with_its_own() -> None:
    part, other, static = (small_net() for _ in range(3))
    whole = nn.HybridSequential()
    whole.add(part, static)
    for net in (whole, other):
        net.hybridize()
    static.hybridize(static_alloc=True, static_shape=True)
    nets = part, other, static, whole

    def compiled() -> list:
        for net in nets[:3]:
            net(mx.nd.ones((4, 2)))
        whole(mx.nd.ones((4, 2)))
        return [internals.traced_symbol(net) is not None for net in nets]

    part.add(nn.Dense(2, in_units=3))
    part[-1].initialize()
    assert compiled() == [True] * 4
    batch_norm.convert_sync_batch_norm(part)
    assert [internals.traced_symbol(net) is None for net in nets] == [True, False, False, True]
    compiled()
    internals.clear_static_graphs([static[0].weight, other[0].weight])
    assert [internals.traced_symbol(net) is None for net in nets] == [False, False, True, False]
    found = internals.every_parameter(whole)
    assert {*map(id, found)} == {*map(id, internals.ordered_parameters(whole))}


def test_other_threads_can_build_tuples_while_graphs_are_dropped() -> None:
    """Python raises SystemError where somebody else has a reference to one that is being built."""
    over, failed = threading.Event(), []

    def build() -> None:
        while not over.is_set():
            try:
                tuple(number for number in range(20_000))
            except SystemError as error:
                failed.append(error)

    builders = [threading.Thread(target=build) for _ in range(2)]
    for builder in builders:
        builder.start()
    for _ in range(40):
        internals.clear_graphs([])
    over.set()
    for builder in builders:
        builder.join()
    assert not failed


def test_the_library_has_the_functions_of_the_c_interface() -> None:
    for name in ("MXNDArrayGetData", "MXNDArrayFromDLPackEx", "MXCustomOpRegister"):
        assert hasattr(internals.C_LIBRARY, name)

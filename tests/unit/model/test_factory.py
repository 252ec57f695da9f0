"""The seed's net has the seed's shapes and d2lzh's arithmetic; other nets load by dotted path."""

from __future__ import annotations

import sys

import d2lzh
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import Block, HybridBlock

from trainer.config import Config, Model
from trainer.errors import ConfigError
from trainer.model import Residual, build, resnet18, resnet_block
from trainer.run.loop import fit


def images(*shape: int) -> mx.nd.NDArray:
    return mx.nd.array(np.random.RandomState(0).uniform(-1, 1, shape))


@pytest.mark.parametrize(
    "block, shape",
    [
        (lambda: Residual(3), (4, 3, 6, 6)),
        (lambda: Residual(6, use_1x1conv=True, strides=2), (4, 6, 3, 3)),
        (lambda: resnet_block(3, 2, first_block=True), (4, 3, 6, 6)),
        (lambda: resnet_block(6, 2), (4, 6, 3, 3)),
    ],
)
@pytest.mark.parametrize("hybridize", [False, True])
def test_seeds_shapes_of_blocks(block, shape, hybridize):
    net = block()
    net.initialize()
    if hybridize:
        net.hybridize()
    assert net(images(4, 3, 6, 6)).shape == shape


@pytest.mark.parametrize(
    "stem, shapes",
    [
        # Of a 64 x 64 image; tests/unit/model/test_summary.py has the seed's table at 224 x 224.
        ("seed", [32, 32, 32, 16, 16, 8, 4, 2, 1]),
        ("small", [64, 64, 64, 64, 32, 16, 8, 1]),
    ],
)
def test_shapes_of_both_stems(stem, shapes):
    net = resnet18(num_classes=7, stem=stem)
    net.initialize()
    x = images(1, 1, 64, 64)
    sides = []
    for layer in net:
        x = layer(x)
        sides.append(x.shape[-1])
    assert sides == [*shapes, 7]
    assert x.shape == (1, 7)


def test_a_width_is_of_every_stage():
    net = resnet18(width=3)
    net.initialize()
    net(images(1, 1, 32, 32))
    weights = net.collect_params(".*conv.*weight").values()
    assert {weight.shape[0] for weight in weights} == {3, 6, 12, 24}
    assert net[-1].weight.shape == (10, 24)


def test_no_such_stem():
    with pytest.raises(ConfigError, match=r"model\.arguments\.stem is 'large'.*seed or small"):
        resnet18(stem="large")


@pytest.mark.parametrize("width", [0, -1, 1.5, "64", None])
def test_no_such_width(width):
    with pytest.raises(ConfigError, match=r"model\.arguments\.width is .*whole number"):
        resnet18(width=width)


# ---------------------------------------------------------------- the real d2lzh


def outputs(net: Block, data: mx.nd.NDArray) -> tuple:
    """Logits in inference and in training mode, and the running statistics after a backward."""
    inference = net(data).asnumpy()
    with autograd.record():
        training = net(data)
    training.backward()
    moved = {
        name: parameter.data().asnumpy()
        for name, parameter in net._collect_params_with_prefix().items()
        if "running" in name
    }
    return inference, training.asnumpy(), moved


@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize("from_d2lzh", [True, False])
def test_parameters_of_d2lzhs_resnet18_give_its_outputs(tmp_path, from_d2lzh, hybridize):
    theirs, ours = d2lzh.resnet18(10), resnet18(stem="small")
    data = images(3, 1, 16, 16)
    mx.random.seed(1)
    source, target = (theirs, ours) if from_d2lzh else (ours, theirs)
    source.initialize(mx.init.Xavier())
    source(data)
    # Running statistics of a net that has seen something, so that these count, too.
    for name, parameter in source.collect_params().items():
        if "running_var" in name:
            parameter.set_data(mx.nd.random.uniform(0.5, 2, parameter.shape))
        elif "running_mean" in name or "beta" in name:
            parameter.set_data(mx.nd.random.uniform(-0.1, 0.1, parameter.shape))
    source.save_parameters(str(tmp_path / "net.params"))
    target.load_parameters(str(tmp_path / "net.params"))
    if hybridize:
        ours.hybridize()
    our_inference, our_training, our_statistics = outputs(ours, data)
    inference, training, statistics = outputs(theirs, data)
    assert np.abs(inference - training).max() > 1e-2  # the two modes differ
    np.testing.assert_allclose(our_inference, inference, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(our_training, training, rtol=1e-4, atol=1e-5)
    assert our_statistics.keys() == statistics.keys() and len(statistics) == 2 * 17
    for name, value in statistics.items():
        np.testing.assert_allclose(our_statistics[name], value, rtol=1e-4, atol=1e-5)


def test_residual_of_d2lzh_and_ours_agree(tmp_path):
    theirs = d2lzh.Residual(6, use_1x1conv=True, strides=2)
    ours = Residual(6, use_1x1conv=True, strides=2)
    data = images(4, 3, 6, 6)
    theirs.initialize(mx.init.Normal(0.5))
    theirs(data)
    theirs.save_parameters(str(tmp_path / "block.params"))
    ours.load_parameters(str(tmp_path / "block.params"))
    np.testing.assert_allclose(ours(data).asnumpy(), theirs(data).asnumpy(), rtol=1e-5, atol=1e-6)


def test_same_seed_draws_the_same_weights():
    def weights():
        mx.random.seed(3)
        net = resnet_block(4, 2)
        net.initialize(mx.init.Xavier())
        net(images(1, 2, 8, 8))
        return [p.data().asnumpy() for p in net.collect_params().values()]

    assert all((a == b).all() for a, b in zip(weights(), weights()))


# ---------------------------------------------------------------- nets by dotted path


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module `mynets` of the user's, where the command is typed."""
    (tmp_path / "mynets.py").write_text(
        """
import random
import numpy as np
from mxnet import nd
from mxnet.gluon import Block, nn

class Imperative(Block):
    def __init__(self, units=3):
        super().__init__()
        self.dense = nn.Dense(units)

    def forward(self, x):
        return self.dense(x) if float(x.sum().asscalar()) > 0 else self.dense(-x)

def make(units=3):
    net = nn.HybridSequential()
    net.add(nn.Dense(units))
    return net

def nothing():
    return None

def fails():
    return {}["width"]

def drawn():
    net = nn.HybridSequential()
    net.add(nn.Dense(random.randint(1, 10**4), in_units=np.random.randint(1, 10**4)), nn.Dense(1))
    net[1].initialize()
    net[1](nd.random.uniform(shape=(1, 3)))
    return net

def adds():
    return make() + 1

made = make()
not_a_function = 3
"""
    )
    (tmp_path / "needsmissing.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "unfinished.py").write_text("def make(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("mynets", "needsmissing"):
        sys.modules.pop(name, None)


def test_default_is_the_seeds_net():
    net = build(Model())
    assert isinstance(net, HybridBlock)
    net.initialize()
    assert net(images(2, 1, 28, 28)).shape == (2, 10)
    assert net[0].weight.shape == (64, 1, 7, 7)


def test_arguments_reach_the_factory():
    net = build(Model(arguments={"num_classes": 4, "stem": "small"}))
    net.initialize()
    assert net(images(2, 1, 28, 28)).shape == (2, 4)
    assert net[0].weight.shape == (64, 1, 3, 3)


def test_users_nets_are_found_where_the_command_is_typed(nets):
    net = build(Model("mynets:make", {"units": 5}))
    net.initialize()
    assert net(images(2, 3)).shape == (2, 5)


def test_imperative_block_is_a_net_too(nets):
    net = build(Model("mynets:Imperative"))
    assert isinstance(net, Block) and not isinstance(net, HybridBlock)
    net.initialize()
    assert net(images(2, 3)).shape == (2, 3)


def test_what_a_factory_draws_goes_by_the_seed(nets):
    """Else ranks would have other nets, and a run could not be resumed."""

    def drawn(seed):
        first, second = build(Model("mynets:drawn"), seed=seed)
        return [*first.weight.shape, *second.weight.data().asnumpy().ravel().tolist()]

    np.random.seed(5)
    again, other = drawn(3), drawn(4)
    assert drawn(3) == again and not set(again) & set(other)
    assert np.random.random_sample() == np.random.RandomState(5).random_sample()


def test_real_d2lzh_by_its_path():
    net = build(Model("d2lzh:resnet18", {"num_classes": 3}))
    net.initialize()
    assert net(images(1, 1, 8, 8)).shape == (1, 3)


@pytest.mark.parametrize(
    "factory, arguments, expected",
    [
        ("mynetz:make", {}, ["mynetz:make", "cannot be imported"]),
        ("mynets.deeper:make", {}, ["mynets.deeper", "cannot be imported"]),
        ("needsmissing:make", {}, ["needsmissing", "a_package_that_is_not_there"]),
        ("mynets:maek", {}, ["mynets:maek", "no such function", "did you mean make?"]),
        ("mynets:not_a_function", {}, ["not_a_function", "no such function"]),
        ("mynets:made", {}, ["mynets:made, which is a net", "a function that makes it"]),
        ("mynets:nothing", {}, ["mynets:nothing", "NoneType", "not a Gluon Block"]),
        ("unfinished:make", {}, ["unfinished cannot be imported", "SyntaxError"]),
        ("mynets:make", {"unitz": 3}, ["mynets:make failed", "model.arguments", "unitz"]),
        ("mynets:fails", {}, ["mynets:fails failed: KeyError: 'width' (mynets.py, line "]),
        ("mynets:adds", {}, ["mynets:adds failed: TypeError: ", "(mynets.py, line "]),
        ("trainer.model:resnet18", {"stem": "x"}, ["model.arguments.stem", "'x'", "small"]),
        ("trainer.model:Residual", {}, ["num_channels"]),
    ],
)
def test_what_is_wrong_with_a_factory_is_reported_in_one_line(nets, factory, arguments, expected):
    with pytest.raises(ConfigError) as raised:
        build(Model(factory, arguments))
    text = str(raised.value)
    assert "\n" not in text
    for part in expected:
        assert part in text


def test_a_config_given_as_the_net_is_reported():
    with pytest.raises(ConfigError, match="the net is a Config; it must be a Gluon Block"):
        fit(Config())

"""Which operators run in bfloat16, when, and where it is refused."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn

from tests.processor import needs_bfloat16
from trainer.errors import ConfigError
from trainer.model import mixed_precision
from trainer.model.mixed_precision import check, computing_in

pytestmark = needs_bfloat16

# 1 + 2^-8 is a float32 and no bfloat16, where it is 1.
FINE, ROUNDED = 1 + 2**-8, 1.0

LAYERS: Dict[str, Callable[[], gluon.Block]] = {
    "dense": lambda: nn.Dense(1, use_bias=False, in_units=1),
    "convolution": lambda: nn.Conv2D(1, kernel_size=1, use_bias=False, in_channels=1),
}
FORMS: Dict[str, Dict[str, Any]] = {  # what hybridize is told
    "imperative": {"active": False},
    "hybridized": {},
    "static": {"static_alloc": True},
}


def one_weight(layer: gluon.Block, weight: float, **form: Any) -> nn.HybridSequential:
    net = nn.HybridSequential()
    net.add(layer)
    net.initialize(mx.init.Constant(weight))
    net.hybridize(**form)
    return net


def product(net: gluon.Block, x: float = 1.0) -> float:
    return float(net(nd.full((1, 1, 1, 1), x)).asscalar())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_input_weight_and_gradients_are_rounded_and_float32(layer: str, form: str) -> None:
    net = one_weight(LAYERS[layer](), FINE, **FORMS[form])
    weight = net[0].weight
    x = nd.full((1, 1, 1, 1), FINE)
    x.attach_grad()
    with computing_in(net, "bfloat16"):
        with autograd.record():
            y = net(x)
        y.backward(nd.full(y.shape, FINE))
        for array in (y, x.grad, weight.grad()):
            assert (array.dtype, array.asscalar()) == (np.float32, ROUNDED)
    assert weight.data().asscalar() == FINE


@pytest.mark.parametrize("form", FORMS)
def test_it_ends_and_can_be_interrupted(form: str) -> None:
    net = one_weight(nn.Dense(1, use_bias=False), FINE, **FORMS[form])
    other = one_weight(nn.Dense(1, use_bias=False), FINE, **FORMS[form])
    assert product(net) == FINE
    with computing_in(net, "bfloat16"):
        assert product(net) == ROUNDED
        assert product(other) == FINE
        with computing_in(net, "float32"):
            assert product(net) == FINE
        assert product(net) == ROUNDED
        with pytest.raises(KeyError), computing_in(net, "bfloat16"):
            raise KeyError
        assert product(net) == ROUNDED
    assert product(net) == FINE


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_added_up_where_asked(form: str) -> None:
    """MXNet's own cast for mixed precision would lose all but what was there."""
    net = one_weight(nn.Dense(1, in_units=1), 1.0, **FORMS[form])
    net.collect_params().setattr("grad_req", "add")
    with computing_in(net, "bfloat16"):
        for _ in range(3):
            with autograd.record():
                y = net(nd.full((1, 1), 2))
            y.backward()
    assert (net[0].weight.grad().asscalar(), net[0].bias.grad().asscalar()) == (6, 3)


def test_an_activation_is_in_float32() -> None:
    net = one_weight(nn.Dense(1, activation="tanh", use_bias=False), 1.0)
    with computing_in(net, "bfloat16"):
        assert product(net, 0.5) == pytest.approx(np.tanh(0.5), rel=1e-6)


class Own(nn.Dense):
    def hybrid_forward(self, F: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        return F.FullyConnected(x, weight, no_bias=True, num_hidden=1)


def own_forward() -> gluon.Block:
    return one_weight(Own(1, use_bias=False), FINE)


def in_float64() -> gluon.Block:
    net = one_weight(nn.Dense(1, use_bias=False), FINE)
    net.cast("float64")
    return net


@pytest.mark.parametrize("make", [own_forward, in_float64])
def test_other_layers_are_left_alone_and_a_net_of_them_is_refused(make: Any) -> None:
    net = make()
    with computing_in(net, "bfloat16"):
        assert float(net(nd.ones((1, 1), dtype=net[0].weight.dtype)).asscalar()) == FINE
    with pytest.raises(ConfigError, match="no float32 layer that would use it"):
        check(net, "bfloat16", mx.cpu())
    check(net, "float32", mx.cpu())


def test_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"on CPUs alone, not on gpu\(0\).*train\.precision="):
        check(nn.Dense(1), "bfloat16", mx.gpu(0))


def test_every_kind_of_layer_it_names_can_do_it() -> None:
    layers: List[gluon.Block] = [
        nn.Conv1D(4, 3),
        nn.Conv2D(4, 3, groups=2, dilation=2, activation="relu"),
        nn.Conv3D(4, 3, strides=2),
        nn.Dense(4, flatten=False),
    ]
    assert {type(layer) for layer in layers} == set(mixed_precision._LAYERS)
    for layer, axes in zip(layers, (1, 2, 3, 1)):
        layer.initialize()
        x = nd.random.normal(shape=(2, 4, *[7] * axes))
        gradients = []
        for precision in ("float32", "bfloat16"):
            with computing_in(layer, precision):
                with autograd.record():
                    y = layer(x)
                y.backward(y)
                gradients.append(layer.weight.grad().asnumpy())
        difference = np.abs(gradients[0] - gradients[1]).max() / np.abs(gradients[0]).max()
        assert 0 < difference < 0.03, layer

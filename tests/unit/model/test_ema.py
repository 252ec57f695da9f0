"""The moving average of weights, against NumPy."""

from __future__ import annotations

from typing import Dict

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn

from trainer.errors import ConfigError
from trainer.model.ema import Ema

RANDOM = np.random.RandomState(0)


def make_net(dtype: str = "float32") -> gluon.Block:
    net = nn.HybridSequential()
    net.add(nn.Conv2D(3, 3, in_channels=2), nn.BatchNorm(in_channels=3), nn.Dense(4, in_units=12))
    net.initialize(mx.init.Normal(1))
    net.cast(dtype)
    return net


def values(net: gluon.Block) -> Dict[str, np.ndarray]:
    named = net._collect_params_with_prefix().items()
    return {name: parameter.data().asnumpy() for name, parameter in named}


def moved(net: gluon.Block) -> None:
    """Other weights and running statistics, as after a step."""
    for parameter in net.collect_params().values():
        parameter.set_data(mx.nd.array(RANDOM.normal(size=parameter.shape), dtype=parameter.dtype))


@pytest.mark.parametrize("decay", [0.5, 0.999])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_averages_are_those_of_numpy(decay: float, dtype: str) -> None:
    net = make_net(dtype)
    ema, expected = Ema(net, decay), values(net)
    for step in range(1, 20):
        moved(net)
        ema.after(step)
        d = min(decay, (1 + step) / (10 + step))
        expected = {k: d * expected[k] + (1 - d) * v for k, v in values(net).items()}
    trained = values(net)
    with ema.in_place():
        for name, value in values(net).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5)
        kept = {name: array.asnumpy() for name, array in ema.others().items()}
        for name, value in trained.items():
            np.testing.assert_array_equal(kept[f"trained:{name}"], value)
    for name, value in values(net).items():
        np.testing.assert_array_equal(value, trained[name])


def test_a_run_goes_on_from_what_it_saved_to_the_last_bit() -> None:
    net, other = make_net(), make_net()
    ema = Ema(net, 0.9)
    for step in (1, 2):
        moved(net)
        ema.after(step)
    with ema.in_place():
        averages, others = values(net), {k: a.copy() for k, a in ema.others().items()}
    for name, parameter in other._collect_params_with_prefix().items():
        parameter.set_data(mx.nd.array(averages[name]))
    resumed = Ema(other, 0.9)
    resumed.train_on(others)
    for one in (ema, resumed):
        RANDOM.seed(7)
        moved(net if one is ema else other)
        one.after(3)
        one.swap()
    for name, value in values(net).items():
        assert value.tobytes() == values(other)[name].tobytes()


def test_a_parameter_of_two_layers_is_averaged_once() -> None:
    net = nn.HybridSequential()
    first = nn.Dense(3, in_units=3)
    net.add(first, nn.Dense(3, in_units=3, params=first.params))
    net.initialize(mx.init.One())
    ema = Ema(net, 0.5)
    first.weight.set_data(mx.nd.zeros((3, 3)))
    ema.after(100)
    with ema.in_place():
        np.testing.assert_allclose(first.weight.data().asnumpy(), 0.5)


def test_what_training_does_not_move_stays_to_the_last_bit() -> None:
    class Net(gluon.HybridBlock):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.frozen, self.slow, self.head = nn.BatchNorm(), *map(nn.Dense, (4, 4, 2))
            self.order = self.params.get_constant("order", RANDOM.permutation(36))
            self.frozen.collect_params().setattr("grad_req", "null")
            self.slow.collect_params().setattr("lr_mult", 0)

        def hybrid_forward(self, F: object, x: mx.nd.NDArray, order: mx.nd.NDArray) -> object:
            return self.head(self.slow(self.frozen(self.norm(x.take(order, axis=1)))))

    net = Net()
    net.initialize(mx.init.Normal(1))
    net(mx.nd.zeros((1, 36)))
    before, ema = values(net), Ema(net, 0.999)
    net.norm.running_mean.set_data(mx.nd.ones(36))
    net.head.weight.set_data(mx.nd.ones((2, 4)))
    for step in range(200):
        ema.after(step)
    ema.swap()
    changed = {name for name, value in values(net).items() if (value != before[name]).any()}
    assert changed == {"norm.running_mean", "head.weight"}


def test_weights_in_which_an_average_would_stand_still_are_refused() -> None:
    said = r"^train.ema is 0.999, and [02].weight is float16, in which .*; keep the net in float32"
    with pytest.raises(ConfigError, match=said):
        Ema(make_net("float16"), 0.999)
    assert not Ema(make_net("float16"), None)


def test_without_a_decay_nothing_is_held() -> None:
    net = make_net()
    ema = Ema(net, None)
    ema.after(1)
    assert not ema and ema.others() == {}

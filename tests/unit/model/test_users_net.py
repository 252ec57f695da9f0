"""What MXNet gets wrong in a compiled net is refused."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn

from trainer.errors import ConfigError
from trainer.model import users_net
from trainer.mxnet_internals import traced_symbol

DATA = mx.nd.array(np.random.RandomState(1).uniform(-1, 1, (1, 2, 3, 3)))


class Recurrent(gluon.HybridBlock):
    """Goes three times through a layer, by one of MXNet's operators of control flow."""

    def __init__(self, operator, factor=1):
        super().__init__()
        self.operator, self.factor = operator, factor
        self.first, self.again = nn.Dense(3, in_units=18), nn.Dense(3, in_units=3)
        self.dropout = nn.Dropout(0.5)

    def hybrid_forward(self, F, x):
        x = self.dropout(self.first(x))
        # Another function of a symbol than of an array: what is compiled has other gradients.
        factor = self.factor if F is mx.sym else 1

        def again(x):
            return F.tanh(self.again(x)) * factor

        if self.operator == "foreach":
            body = lambda i, x: (x, again(F.broadcast_add(x, i)))  # noqa: E731
            return F.contrib.foreach(body, F.zeros((3, 1, 1)), x)[1]
        if self.operator == "while_loop":
            own = {"cond": lambda n, _: n < 3, "func": lambda n, x: (x, [n + 1, again(x)])}
            start = [F.zeros((1,)), x]
            return F.contrib.while_loop(loop_vars=start, max_iterations=3, **own)[1][1]
        return F.contrib.cond(x.sum() > 0, lambda: x * 2, lambda: x)


def compiled(net):
    net.initialize(mx.init.Normal(0.5))
    net.hybridize(static_alloc=True)
    net(DATA)
    return net


@pytest.mark.parametrize("operator", ["foreach", "while_loop"])
@pytest.mark.parametrize("inside", [True, False])
def test_loops_are_compared_with_what_is_not_compiled(operator, inside):
    """Gradients are left as they were, and the net compiled; dropout is out of it."""
    net = part = compiled(Recurrent(operator))
    if inside:
        net = nn.Sequential()
        net.add(part)
    users_net.check_compiled(net, DATA)
    assert traced_symbol(part) is not None and ("static_alloc", True) in part._flags
    assert not any(p.grad().asnumpy().any() for p in net.collect_params().values())
    message = rf"has F.contrib.{operator}, .* nets \(here those of (first|again).weight\); set"
    net = compiled(Recurrent(operator, factor=1.2))
    with pytest.raises(ConfigError, match=message):
        users_net.check_compiled(net, DATA)
    net.hybridize(active=False)
    users_net.check_compiled(net, DATA)


def test_cond_is_refused_where_it_is_compiled():
    net = compiled(Recurrent("cond"))
    with pytest.raises(ConfigError, match=r"compiled and has F\.contrib\.cond, whose gradients"):
        users_net.check_compiled(net, DATA)
    net.hybridize(active=False)
    users_net.check_compiled(net, DATA)


def test_a_net_without_loops_is_not_run(monkeypatch):
    net = compiled(nn.Dense(3))
    monkeypatch.setattr(mx.autograd, "record", None)
    users_net.check_compiled(net, DATA)

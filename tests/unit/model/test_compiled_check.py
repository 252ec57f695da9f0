"""Compiled control flow: wrong gradients are refused, right ones and other nets are left alone."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import HybridBlock, nn

from trainer.config import from_dict
from trainer.errors import ConfigError
from trainer.model import compiled_check
from trainer.run.loop import fit

BATCH = mx.nd.array(np.random.RandomState(0).randn(12, 1, 6, 6))


class Flow(HybridBlock):
    """A layer, control flow of one kind, and another layer."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.inner = kind, nn.Dense(8, activation="tanh")
        self.head = nn.Dense(4)

    def hybrid_forward(self, F, x):
        x = self.inner(x)
        if self.kind == "cond":
            x = F.contrib.cond(F.sum(x) > 0, lambda: x * 2, lambda: x * 3)
        elif self.kind == "foreach":
            x, _ = F.contrib.foreach(lambda row, s: (row * s[0], [s[0] * 1.1]), x, [x.sum(axis=0)])
        elif self.kind == "while_loop":
            loop = F.contrib.while_loop(
                lambda i, v: i < 3,
                lambda i, v: (v * 2, [i + 1, v * 1.5]),
                [F.zeros((1,)), x],
                max_iterations=3,
            )
            x = F.slice_axis(loop[0], axis=0, begin=0, end=3).sum(axis=0)
        return self.head(x)


class Plain(mx.gluon.Block):
    """An imperative net with a compiled part."""

    def __init__(self, part: HybridBlock):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)


def compiled(net: mx.gluon.Block) -> mx.gluon.Block:
    mx.random.seed(1)
    net.initialize(mx.init.Xavier())
    net(BATCH)  # MXNet infers no shapes through control flow
    net.hybridize(static_alloc=True)
    net(BATCH)
    return net


@pytest.mark.parametrize("outer", [Flow, lambda kind: Plain(Flow(kind))])
def test_wrong_gradients_of_a_compiled_branch_are_refused(outer):
    net = compiled(outer("cond"))
    with pytest.raises(ConfigError) as raised:
        compiled_check.check(net, lambda: BATCH)
    assert "F.contrib.cond, whose gradients MXNet 1.9.1 gets wrong" in str(raised.value)
    assert "set model.hybridize=false" in str(raised.value)


@pytest.mark.parametrize("kind", ["foreach", "while_loop"])
def test_control_flow_that_is_right_stays_compiled_and_as_it_was(kind):
    net = compiled(Flow(kind))
    trained = list(net.collect_params().values())
    for parameter in trained:
        parameter.grad()[:] = 7
    compiled_check.check(net, lambda: BATCH)
    assert compiled_check.control_flow(net) == {kind}, "compiled"
    assert all((p.grad().asnumpy() == 7).all() for p in trained)
    assert not any(p.data()._fresh_grad for p in trained)


class OtherwiseCompiled(Flow):
    """Control flow as MXNet would compile it if it got it wrong."""

    def hybrid_forward(self, F, x):
        return super().hybrid_forward(F, x if F is mx.nd else x * 1.2)


def test_gradients_that_differ_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"F\.contrib\.foreach, .* gradient of .*_weight is"):
        compiled_check.check(compiled(OtherwiseCompiled("foreach")), lambda: BATCH)


def test_a_net_without_control_flow_is_not_run():
    compiled_check.check(compiled(Flow("none")), lambda: pytest.fail("it has read a batch"))


@pytest.mark.parametrize("hybridize", [True, False])
def test_a_run_is_refused_before_its_first_step_and_goes_on_without_compilation(
    tmp_path, hybridize
):
    draw = np.random.RandomState(0)
    images = draw.randint(0, 256, (12, 6, 6)).astype(np.uint8), np.arange(12) % 4
    config = from_dict(
        {
            "output": str(tmp_path),
            "train": {"epochs": 1, "global_batch_size": 4},
            "model": {"hybridize": hybridize},
        }
    )
    if not hybridize:
        assert fit(Flow("cond"), config, train=images, test=images).steps == 3
        return
    with pytest.raises(ConfigError, match=r"F\.contrib\.cond, .* model\.hybridize=false"):
        fit(Flow("cond"), config, train=images, test=images)
    assert not list(tmp_path.iterdir())

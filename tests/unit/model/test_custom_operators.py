"""Operators and functions of the user's own, between convolutions."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import trainer.model  # noqa: F401 - mends MXNet's

DATA = mx.nd.array(np.random.RandomState(0).normal(size=(8, 16, 16, 16)))
ARRAY = mx.nd.ones((2, 3))


class Same(mx.operator.CustomOp):
    """Gives what it is given, and counts its calls in its state."""

    def forward(self, is_train: bool, req: Any, in_data: Any, out_data: Any, aux: Any) -> None:
        self.assign(out_data[0], req[0], in_data[0] * 1)
        aux[0][:] = aux[0] + 1

    def backward(
        self, req: Any, out_grad: Any, in_data: Any, out_data: Any, in_grad: Any, aux: Any
    ) -> None:
        self.assign(in_grad[0], req[0], out_grad[0] * 1)


@mx.operator.register("tests_same")
class SameProp(mx.operator.CustomOpProp):
    """Declares it."""

    def list_auxiliary_states(self) -> List[str]:
        return ["calls"]

    def infer_shape(self, in_shape: List[Any]) -> Any:
        return in_shape, in_shape, [(1,)]

    def create_operator(self, ctx: Any, shapes: Any, dtypes: Any) -> Same:
        return Same()


class SameFunction(autograd.Function):
    """The same as an imperative function."""

    def forward(self, x: mx.nd.NDArray) -> mx.nd.NDArray:
        return x * 1

    def backward(self, dy: mx.nd.NDArray) -> mx.nd.NDArray:
        return dy * 1


class Net(gluon.HybridBlock):
    """Two convolutions, and ``way`` between them."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.first = nn.Conv2D(32, kernel_size=3, padding=1, in_channels=16)
        self.second = nn.Conv2D(32, kernel_size=3, padding=1, in_channels=32)
        kept = {"init": "zeros", "differentiable": False}
        self.calls = self.params.get("calls", shape=(1,), **kept)

    def hybrid_forward(self, F: Any, x: Any, calls: Any) -> Any:
        x = self.first(x)
        if self.way == "operator":
            x = F.Custom(x, calls, op_type="tests_same")
        if self.way == "function":
            x = SameFunction()(x)
        return self.second(x)


def computed(net: gluon.Block) -> Dict[str, np.ndarray]:
    with autograd.record():
        scores = net(DATA)
    scores.backward(scores * scores)
    found = {"scores": scores.asnumpy(), "in inference": net(DATA).asnumpy()}
    named = net._collect_params_with_prefix().items()
    return {**found, **{k: p.grad().asnumpy() for k, p in named if p.grad_req != "null"}}


FORMS = [None, {}, {"static_alloc": True}, {"forward_bulk_size": 1, "backward_bulk_size": 1}]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("way", ["operator", "function"])
def test_convolutions_around_it_change_nothing(way: str, form: Optional[Dict[str, Any]]) -> None:
    """In most calls MXNet would give it arrays whose memory has been freed."""
    if way == "function" and form is not None:
        pytest.skip("a function takes arrays alone")
    plain, net = Net("nothing"), Net(way)
    plain.initialize(mx.init.Normal(0.1))
    net.initialize()
    for name, parameter in net._collect_params_with_prefix().items():
        parameter.set_data(plain._collect_params_with_prefix()[name].data())
    if form is not None:
        net.hybridize(**form)
    expected = computed(plain)
    for _ in range(8):
        for name, values in computed(net).items():
            allowed = 1e-5 * np.abs(expected[name]).max()
            np.testing.assert_allclose(values, expected[name], atol=allowed, err_msg=name)
    if way == "operator":  # its state is no copy
        assert net.calls.data().asscalar() == 16


class Two(mx.operator.CustomOp):
    """What it is given, and one more."""

    def forward(self, is_train: bool, req: Any, in_data: Any, out_data: Any, aux: Any) -> None:
        for number in (0, 1):
            self.assign(out_data[number], req[number], in_data[0] + number)


@mx.operator.register("tests_two")
class TwoProp(mx.operator.CustomOpProp):
    """Declares it."""

    def list_outputs(self) -> List[str]:
        return ["same", "more"]

    def infer_shape(self, in_shape: List[Any]) -> Any:
        return in_shape, 2 * in_shape, []

    def create_operator(self, ctx: Any, shapes: Any, dtypes: Any) -> Two:
        return Two()


def test_several_outputs_and_symbols_by_name_are_as_before() -> None:
    same, more = mx.nd.Custom(ARRAY, op_type="tests_two")
    assert (same.asnumpy() == 1).all() and (more.asnumpy() == 2).all()
    symbols = mx.sym.Custom(data=mx.sym.var("x") * 3, op_type="tests_two")
    assert len(symbols) == 2
    (found,) = symbols[1].bind(mx.cpu(), {"x": ARRAY}).forward()
    assert (found.asnumpy() == 4).all()
    mx.nd.Custom(ARRAY, op_type="tests_two", out=[same, more])
    assert (more.asnumpy() == 2).all()

"""The graph written for TensorBoard, compared to its net."""

from __future__ import annotations

import mxnet as mx
import pytest
from mxnet.gluon import nn

from trainer import batch_norm
from trainer.model import resnet18
from trainer.model.graph import draws_nothing, graph_def


def test_layers_are_scopes_and_edges_lead_from_layer_to_layer():
    net = resnet18()
    net.initialize()
    batch_norm.convert_sync_batch_norm(net)
    net.hybridize()
    graph = graph_def(net)
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    sources = {source for node in graph.node for source in node.input}
    assert sources <= set(names)
    convolutions = [node for node in graph.node if node.op == "Convolution"]
    assert len(convolutions) == 1 + 4 * 4 + 3
    first, second = convolutions[:2]
    scopes = second.name.split("/")
    assert "residual" in scopes[-3] and "conv" in scopes[-2] and scopes[-1] == "fwd"
    assert first.attr["kernel"].s == b"(7, 7)" and first.input[0] == "data"
    assert {node.op for node in graph.node if node.name.endswith("weight")} == {"Parameter"}


def test_tracing_leaves_the_net_as_it_was():
    net = resnet18()
    net.initialize()
    net.hybridize(static_alloc=True)
    data = mx.nd.ones((1, 1, 28, 28))
    before = net(data).asnumpy()
    graph_def(net)
    assert (net(data).asnumpy() == before).all()


class Noisy(nn.HybridSequential):
    """Its own forward, around a compiled one."""

    def forward(self, x):
        return super().forward(x + mx.nd.random.normal(shape=x.shape))


def dense(*more, kind=nn.HybridSequential):
    net = kind()
    net.add(nn.Dense(3, activation="relu"), *more)
    return net


def hooked():
    net = dense()
    net.register_forward_hook(lambda *given: mx.nd.random.normal())
    return net


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (resnet18, True),
        (dense, True),
        (lambda: dense(nn.Dropout(0.5)), False),
        (lambda: dense(nn.LeakyReLU(0.1)), False),  # an operator that has a random form
        (lambda: dense(nn.Lambda(lambda x: x), kind=nn.Sequential), False),
        (lambda: dense(kind=Noisy), False),
        (hooked, False),
    ],
)
def test_a_net_is_known_to_draw_nothing_by_its_graph_alone(make, known):
    net = make()
    net.initialize()
    net(mx.nd.ones((2, 1, 28, 28)))
    assert not draws_nothing(net)  # not compiled
    net.hybridize()
    net(mx.nd.ones((2, 1, 28, 28)))
    assert draws_nothing(net) == known

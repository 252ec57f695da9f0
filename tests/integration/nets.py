"""Small nets that the integration tests name by their dotted path."""

from __future__ import annotations

from mxnet import gluon, nd
from mxnet.gluon import nn


def small() -> gluon.Block:
    """A thousand weights, with batch norm and dropout."""
    net = nn.HybridSequential()
    net.add(
        nn.Conv2D(4, kernel_size=5, strides=4),
        nn.BatchNorm(),
        nn.Activation("relu"),
        nn.Dropout(0.2),
        nn.Dense(10),
    )
    return net


class Imperative(gluon.Block):
    """A Block that looks at its values: nothing in it can be hybridized."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x: nd.NDArray) -> nd.NDArray:
        y = self.body(x)
        return y * 2 if y.sum().asscalar() > 1e9 else y


def imperative() -> gluon.Block:
    """The imperative one."""
    return Imperative()


def not_a_net() -> int:
    """Something else."""
    return 3

"""Small nets that the integration tests name by their dotted path."""

from __future__ import annotations

import os
import time
from typing import Any

from mxnet import autograd, gluon, nd
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


class Steady(gluon.Block):
    """Without chance, so that any ranks give the same; a step takes $STEP_SECONDS longer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.HybridSequential()
        self.body.add(
            nn.Conv2D(4, kernel_size=5, strides=4),
            nn.BatchNorm(),
            nn.Activation("relu"),
            nn.Dense(10),
        )

    def forward(self, x: nd.NDArray) -> nd.NDArray:
        if autograd.is_training():
            time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
        return self.body(x)


def steady() -> gluon.Block:
    """The steady one."""
    return Steady()


def smooth() -> gluon.Block:
    """With batch norm, without dropout (which differs between ranks); rounding stays rounding."""
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, kernel_size=5, strides=4, activation="tanh"), nn.BatchNorm(), nn.Dense(10))
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


class LooksAtItsShape(gluon.HybridBlock):
    """A HybridBlock that runs as it is, but not as a symbol, which has no shape."""

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return x.reshape((x.shape[0], -1)).slice_axis(axis=1, begin=0, end=10)


def not_a_net() -> int:
    """Something else."""
    return 3

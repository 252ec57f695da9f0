"""The moving average of a net's weights (``train.ema``), which is evaluated, saved and exported.

As in TensorFlow and timm, it soon forgets the initial weights: see :meth:`Ema.after`. Running
statistics are averaged like weights.
"""

from __future__ import annotations

import contextlib
from typing import Dict, Iterator, Mapping, Optional

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import dist
from ..errors import ConfigError
from ..mxnet_internals import is_statistic, structural_parameters

# Before the name of a parameter, in a checkpoint whose net has the averages: as it is trained.
TRAINED = "trained:"


class Ema:
    """The averages of what training moves, on the net's device; none without a decay."""

    def __init__(self, net: gluon.Block, decay: Optional[float]):
        """Begin with the weights of ``net``; ConfigError where one is float16, which rounds a small
        step of its average to none.
        """
        self._decay = decay
        named = sorted(structural_parameters(net).items(), reverse=True)
        found = {id(p): (name, p) for name, p in named}  # each once
        self._held = [
            (name, p, p.data().copy())
            for name, p in found.values()
            if decay is not None and np.issubdtype(np.dtype(p.dtype), np.floating)
            if is_statistic(p) or (p.grad_req != "null" and p.lr_mult)
        ]
        for name, _, average in self._held:
            if average.dtype == np.float16:
                raise ConfigError(
                    f"train.ema is {decay:g}, and {name} is float16, in which an average would "
                    "stand still; keep the net in float32 and set train.precision=float16"
                )

    def train_on(self, trained: Mapping[str, mx.nd.NDArray]) -> None:
        """Give the net of every rank what rank 0's :meth:`others` were when saved; collective."""
        for name, parameter, _ in self._held:
            if TRAINED + name in trained:
                parameter.set_data(trained[TRAINED + name])
        if self._held:
            dist.broadcast_parameters([parameter for _, parameter, _ in self._held])

    def after(self, step: int) -> None:
        """Take in the weights after ``step`` steps; asynchronous."""
        if self._decay is not None:
            new = 1 - min(self._decay, (1 + step) / (10 + step))
            for _, parameter, average in self._held:
                # In one pass: average - new * (average - weights)
                how = {"lr": new, "wd": 1.0, "rescale_grad": -1.0, "out": average}
                mx.nd.sgd_update(average, parameter.data(), **how)

    def swap(self) -> None:
        """Exchange the net's weights and their averages."""
        if self._held:
            mx.nd.waitall()  # oneDNN reorders weights in place during a forward
        for _, parameter, average in self._held:
            own = parameter.data().copy()
            average.copyto(parameter.data())
            own.copyto(average)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the net has the averages."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def others(self) -> Dict[str, mx.nd.NDArray]:
        """What the net does not hold: within :meth:`in_place` what trains; for a checkpoint."""
        return {TRAINED + name: array for name, _, array in self._held}

    def __bool__(self) -> bool:
        return bool(self._held)

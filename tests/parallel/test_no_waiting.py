"""A steady step on the path that GPUs take makes no call in which the host waits for the device.

Counted are the calls of MXNet's C interface that block, on ranks that share no memory and, with
synced norm, as BATCH_NORM_NATIVE=device has it: what GPUs do, on CPUs.
"""

from __future__ import annotations

from typing import Any, Dict

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn

from trainer import batch_norm, dist
from trainer.config import from_dict
from trainer.data.loader import Batch
from trainer.model.loss_scale import LossScale
from trainer.mxnet_internals import C_LIBRARY
from trainer.step import momentum
from trainer.step.metrics import TrainMetrics
from trainer.step.optimizer import make_trainer
from trainer.step.step import train_step

RANKS = (2, 3)
BLOCKING = (
    "MXNDArraySyncCopyToCPU",
    "MXNDArraySyncCopyFromCPU",
    "MXNDArrayWaitToRead",
    "MXNDArrayWaitToWrite",
    "MXNDArrayWaitAll",
)
STEPS = 4


class Counted:
    """In the place of MXNet's library: counts the calls that block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: Dict[str, int] = {}
        for name in BLOCKING:
            monkeypatch.setattr(C_LIBRARY, name, self._counting(name, getattr(C_LIBRARY, name)))

    def _counting(self, name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return function(*arguments)

        return call


@pytest.mark.parametrize("norm", ["local", "sync"])
@pytest.mark.parametrize("optimizer", [{}, {"nesterov": True}, {"accumulate": 2}])
@pytest.mark.parametrize("scaled", [False, True])
def test_no_call_of_a_steady_step_blocks(
    norm: str, optimizer: Dict[str, Any], scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``scaled`` as in float16, whose products CPUs lack."""
    monkeypatch.setenv("BATCH_NORM_NATIVE", "device")
    monkeypatch.setattr(momentum.NAG, "joined_on", "cpu")
    config = from_dict(
        {"batch_norm": norm, "optimizer": {"lr": 0.01, "shared_memory": False, **optimizer}}
    )
    mx.random.seed(0)
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3, in_channels=1), nn.BatchNorm(in_channels=4), nn.Activation("relu"))
    net.add(nn.Flatten(), nn.Dense(10, in_units=4 * 6 * 6))
    if norm == "sync":
        batch_norm.convert_sync_batch_norm(net)
    net.initialize()
    net.hybridize(static_alloc=True)
    batch_norm.connect(net)
    trainer = make_trainer(net, config.optimizer)
    scale = LossScale(mx.cpu()) if scaled else None
    metrics = TrainMetrics(mx.cpu(), parameters=net.collect_params().values(), scale=scale)
    data = mx.nd.array(np.random.RandomState(dist.rank()).normal(size=(4, 1, 8, 8)))
    parts = (2, 2) if "accumulate" in optimizer else ()
    batch = Batch(data, mx.nd.array([0, 1, 2, 3]), 4, 4 * dist.world_size(), parts)

    def steps(first: int) -> None:
        for step in range(first, first + STEPS):
            metrics.add(step, train_step(net, trainer, batch, config, scale=scale), 4)

    steps(0)
    mx.nd.waitall()
    counted = Counted(monkeypatch)
    steps(STEPS)
    made = dict(counted.calls)
    mx.nd.waitall()
    assert counted.calls["MXNDArrayWaitAll"] == 1  # it counts
    assert made == {}
    assert np.isfinite(metrics.read(end=True).loss)

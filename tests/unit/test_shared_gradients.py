"""A rank lost while gradients are added up; that sums come out right is for tests/parallel."""

from __future__ import annotations

from pathlib import Path

import mxnet as mx
import pytest
from mxnet.gluon import nn

from trainer.shared_gradients import SharedGradients
from trainer.shared_memory import SharedMemorySum


def test_a_lost_rank_is_noticed(tmp_path: Path) -> None:
    net = nn.Dense(2, in_units=3)
    net.initialize()
    with mx.autograd.record():
        loss = net(mx.nd.ones((1, 3)))
    loss.backward()
    add_up = SharedGradients(mx.gluon.Trainer(net.collect_params(), "sgd", kvstore=None))
    add_up._shared = SharedMemorySum(str(tmp_path / "sum"), 8, 0, 2)  # the other is not there
    add_up._connected = True
    with pytest.raises(RuntimeError, match="process 1 of 2 on this node ended"):
        add_up()

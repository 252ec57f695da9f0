"""Gradients of a lost rank or a diverging net; tests/parallel checks the sums."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn

from trainer.dist.shared_memory import SharedMemorySum
from trainer.step.gradient_rows import Rows, sum_rows


def test_a_lost_rank_is_noticed(tmp_path: Path) -> None:
    net = nn.Dense(2, in_units=3)
    net.initialize()
    with mx.autograd.record():
        loss = net(mx.nd.ones((1, 3)))
    loss.backward()
    descriptor = os.open(tmp_path / "sum", os.O_CREAT | os.O_RDWR)
    peers = SharedMemorySum(descriptor, 1, 0, 2)  # process 1 never connects
    parameters = list(net.collect_params().values())
    row = Rows.bytes_of(parameters)
    shared = Rows([parameters], mmap.mmap(-1, 2 * row), row, peers)
    with pytest.raises(RuntimeError, match="process 1 of 2 on this node ended"):
        shared.allreduce()


def test_gradients_that_are_not_finite_are_summed_without_a_warning() -> None:
    rows = np.array([[np.inf, 3e38, np.nan], [-np.inf, 3e38, 1]], np.float32)
    with np.errstate(all="raise"):
        sum_rows(rows, slice(0, 3))
    np.testing.assert_array_equal(rows[0], [np.nan, np.inf, np.nan])

"""The drift of running means between ranks, on a case computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from mxnet.gluon import nn

from trainer.model.replica import drift


def test_drift_is_in_standard_deviations_over_all_channels_and_of_the_worst_layer():
    net = nn.HybridSequential()
    net.add(nn.BatchNorm(in_channels=1), nn.BatchNorm(in_channels=3))
    net.initialize()
    # In the order of the net's parameters: mean and variance of one layer, then of the other.
    ranks = np.zeros((2, 8), np.float32)
    ranks[:, 1], ranks[:, 5:] = 4, 1
    ranks[:, 0] = -2, 2  # one channel: 2 from their mean, of which a standard deviation has 2
    ranks[:, 2] = 10, 10  # alike
    assert drift(net, ranks) == pytest.approx({"drift": 0.5, "drift_worst_layer": 1.0})


def test_without_batch_norm_there_is_no_drift():
    net = nn.Dense(2, in_units=2)
    net.initialize()
    assert drift(net, np.zeros((2, 0), np.float32)) == {}

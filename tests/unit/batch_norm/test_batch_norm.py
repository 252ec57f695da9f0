"""Conversion of nets, and synced batch norm on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn

from trainer import batch_norm
from trainer.batch_norm import running_statistics
from trainer.model import resnet18


class SeedResidual(nn.Block):
    """The seed notebook's own block, as it stands there."""

    def __init__(self, num_channels: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.conv1 = nn.Conv2D(num_channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2D(num_channels, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm()
        self.bn2 = nn.BatchNorm()

    def forward(self, x: Any) -> Any:
        y = nd.relu(self.bn1(self.conv1(x)))
        return nd.relu(self.bn2(self.conv2(y)) + x)


def seed_net() -> gluon.Block:
    net = nn.Sequential()
    net.add(nn.Conv2D(3, 3), nn.BatchNorm(), SeedResidual(3), nn.BatchNormReLU(), nn.Dense(2))
    return net


def data() -> nd.NDArray:
    return nd.array(np.random.RandomState(0).normal(size=(4, 1, 8, 8)))


def norms(net: gluon.Block) -> list:
    return [type(layer) for layer in batch_norm.layers_of(net)]


@pytest.mark.parametrize("initialized", ["not", "deferred", "wholly"])
def test_conversion_there_and_back_keeps_names_weights_and_classes(initialized: str) -> None:
    net = seed_net()
    classes, names = norms(net), list(net.collect_params())
    assert classes == [nn.BatchNorm, nn.BatchNorm, nn.BatchNorm, nn.BatchNormReLU]
    if initialized != "not":
        net.initialize()
    before = net(data()).asnumpy() if initialized == "wholly" else None
    assert batch_norm.convert_sync_batch_norm(net) is net
    assert norms(net) == [batch_norm.SyncBatchNorm] * 4
    assert list(net.collect_params()) == names
    if initialized == "not":
        net.initialize()
    during = net(data()).asnumpy()
    if before is not None:
        np.testing.assert_array_equal(during, before)
    assert batch_norm.revert_sync_batch_norm(net) is net
    assert norms(net) == classes and list(net.collect_params()) == names
    np.testing.assert_array_equal(net(data()).asnumpy(), during)


def test_files_load_both_ways(tmp_path: Path) -> None:
    plain, synced = seed_net(), batch_norm.convert_sync_batch_norm(seed_net())
    for first, second in ((plain, synced), (synced, plain)):
        first.initialize(mx.init.Normal(1), force_reinit=True)
        outputs = first(data()).asnumpy()
        first.save_parameters(str(tmp_path / "net.params"))
        second.load_parameters(str(tmp_path / "net.params"))
        np.testing.assert_array_equal(second(data()).asnumpy(), outputs)


@pytest.mark.parametrize("hybridize", [False, True])
def test_one_rank_is_plain_batch_norm_to_the_last_bit(hybridize: bool) -> None:
    results = []
    for convert in (False, True):
        mx.random.seed(0)
        net = resnet18()
        net.initialize(mx.init.Xavier())
        if convert:
            batch_norm.convert_sync_batch_norm(net)
        if hybridize:
            net.hybridize(static_alloc=True)
        with autograd.record():
            y = net(data())
        y.backward()
        found = [
            parameter.data() if parameter.grad_req == "null" else parameter.grad()
            for parameter in net.collect_params().values()
        ]
        results.append([array.asnumpy() for array in (y, *found)])
    for plain, synced in zip(*results):
        np.testing.assert_array_equal(plain, synced)


def test_a_hybridized_net_forgets_the_layers_it_traced() -> None:
    net = nn.HybridSequential()
    net.add(nn.Dense(3), nn.BatchNorm())
    net.initialize()
    net.hybridize()
    net(nd.ones((2, 3)))
    running_statistics.calibrate(net, [(nd.array([[1, 2, 3], [4, 5, 7]]), 2)])
    expected = net[0](nd.array([[1, 2, 3], [4, 5, 7]])).asnumpy()
    variance = net[1].running_var.data().asnumpy()
    np.testing.assert_allclose(variance, expected.var(axis=0), rtol=1e-4)


def test_a_class_with_its_own_forward_is_refused_and_the_net_left_alone() -> None:
    class Scaled(nn.BatchNorm):
        def hybrid_forward(self, F: Any, x: Any, *parameters: Any, **named: Any) -> Any:
            return 2 * super().hybrid_forward(F, x, *parameters, **named)

    net = nn.HybridSequential()
    net.add(nn.BatchNorm(), Scaled())
    with pytest.raises(ValueError, match=r"scaled\d+ is a Scaled.*use mxnet\.gluon\.nn\.BatchNorm"):
        batch_norm.convert_sync_batch_norm(net)
    assert norms(net) == [nn.BatchNorm, Scaled]


def test_calibration_restores_the_class_of_every_layer() -> None:
    net = nn.HybridSequential()
    net.add(nn.BatchNorm(in_channels=3), nn.BatchNorm(in_channels=3, use_global_stats=True))
    net.initialize()
    running_statistics.calibrate(net, [(nd.array([[1, 2, 3], [4, 5, 7]]), 2)])
    assert [type(layer) for layer in net] == [nn.BatchNorm, nn.BatchNorm]
    assert not batch_norm.is_synced(net)


def test_bad_counts_are_named() -> None:
    net = seed_net()
    net.initialize()
    net(data())
    with pytest.raises(ValueError, match="4 samples says it has 3"):
        running_statistics.calibrate(net, [(data(), 3)])
    with pytest.raises(ValueError, match="at least one batch"):
        running_statistics.calibrate(net, [])
    with pytest.raises(ValueError, match="counts are all 0"):
        running_statistics.merge(net, 0)
    assert nn.BatchNorm in norms(net)

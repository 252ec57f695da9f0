"""A net is brought to its device, or it is said why it cannot be."""

from __future__ import annotations

import mxnet as mx
import pytest
from mxnet.gluon import nn

from trainer import replica
from trainer.config import Config
from trainer.settings import ConfigError


def pooled() -> nn.HybridSequential:
    net = nn.HybridSequential()
    net.add(nn.Conv2D(2, kernel_size=3), nn.AvgPool2D(pool_size=13), nn.Dense(10))
    return net


@pytest.mark.parametrize("hybridize", [True, False])
def test_a_net_that_does_not_fit_the_images_is_told_in_a_line(hybridize):
    net = pooled()
    if hybridize:
        net.hybridize()
    with pytest.raises(ConfigError) as raised:
        replica.prepare(net, Config(), (1, 8, 8), mx.cpu())
    message = str(raised.value)
    assert "\n" not in message
    for part in ("(1, 8, 8)", "kernel size (13) exceeds input (6", "data.image_size"):
        assert part in message


def test_a_net_that_fits_shows_its_layers():
    layers = replica.prepare(pooled(), Config(), (1, 15, 15), mx.cpu())
    assert [row.output for row in layers][-1] == (1, 10)


@pytest.mark.parametrize(
    ("last", "shown"), [(nn.Dense(7), "(1, 7)"), (nn.Conv2D(10, kernel_size=1), "(1, 10, 3, 3)")]
)
def test_scores_that_do_not_fit_the_classes_are_told(last, shown):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(2, kernel_size=3), last)
    replica.prepare(net, Config(), (1, 5, 5), mx.cpu())
    with pytest.raises(ConfigError, match="the data has 10 classes") as raised:
        replica.class_scores(net, (1, 5, 5), mx.cpu(), classes=10)
    assert shown in str(raised.value)

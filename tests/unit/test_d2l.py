"""What ``train_ch5`` refuses before it joins the other ranks."""

from __future__ import annotations

import mxnet as mx
import pytest
from mxnet import gluon
from mxnet.gluon import nn

from trainer.d2l import _over_ranks, train_ch5
from trainer.errors import ConfigError
from trainer.run import agreement


def test_a_trainer_with_an_allreduce_of_its_own_is_refused():
    """As Horovod's, whose order of parameters depends on what a rank has made before."""
    net = nn.Dense(2, in_units=3)
    net.initialize()
    trainer = type("Own", (gluon.Trainer,), {})(net.collect_params(), "sgd")
    with pytest.raises(ValueError, match="^trainer is an? Own; give train_ch5 a plain gluon.Tr"):
        train_ch5(net, [], [], 4, trainer, mx.cpu(), 1)


@pytest.mark.parametrize("once", ["train_iter", "test_iter"])
def test_batches_that_can_be_read_only_once_are_refused(once):
    net, batches = nn.Dense(2, in_units=3), [(mx.nd.ones((4, 3)), mx.nd.zeros(4))]
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), "sgd")
    iters = {"train_iter": batches, "test_iter": batches, once: iter(batches)}
    with pytest.raises(ValueError, match=f"^{once} can be read only once; give a DataLoader"):
        train_ch5(net, *iters.values(), 4, trainer, mx.cpu(), 1)


def test_ranks_on_one_gpu_are_refused(monkeypatch):
    """As by ``d2l.try_gpu()``. There is no GPU here: what the ranks say of theirs is faked."""
    told = [("gpu", "node", "0000:01", f"rank {rank}") for rank in range(2)]
    gathered = iter([told, [None, None]])
    monkeypatch.setattr(agreement.dist, "gather_objects", lambda own: next(gathered))
    net, batches = nn.Dense(2, in_units=3), [(mx.nd.ones((4, 3)), mx.nd.zeros(4))]
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), "sgd")
    with pytest.raises(
        ConfigError, match=r"same GPU.* train_ch5 ctx=mx.gpu\(dist.local_rank\(\)\)"
    ):
        train_ch5(net, batches, batches, 4, trainer, mx.cpu(), 1)


def test_gradients_that_are_added_up_are_refused():
    net = nn.Dense(2, in_units=3)
    net.initialize()
    net.weight.grad_req = "add"
    trainer = gluon.Trainer(net.collect_params(), "sgd")
    said = "_weight: gradients are added up .* grad_req"
    with pytest.raises(ValueError, match=said), _over_ranks(trainer, net):
        pass


def test_images_of_another_type_than_the_weights_are_reported_in_one_line():
    net, batches = nn.Dense(2, in_units=3), [(mx.nd.ones((4, 3), dtype="float64"), mx.nd.zeros(4))]
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), "sgd")
    with pytest.raises(ConfigError, match="the net cannot take float64 images of .*") as raised:
        train_ch5(net, batches, batches, 4, trainer, mx.cpu(), 1)
    assert "\n" not in str(raised.value)

"""Collectives between real Horovod ranks."""

from __future__ import annotations

import mxnet as mx
import numpy as np

from trainer import dist

RANK, SIZE = dist.rank, dist.world_size


def test_sum_over_ranks_keeps_dtype() -> None:
    for dtype in (np.float32, np.float64, np.int64):
        total = dist.allreduce_sum(np.array([RANK(), 1], dtype), f"test.{np.dtype(dtype).name}")
        assert total.dtype == dtype
        assert total.tolist() == [SIZE() * (SIZE() - 1) / 2, SIZE()]


def test_asynchronous_sum_replaces_its_argument() -> None:
    tensor = mx.nd.full((3,), RANK() + 1.0)
    dist.allreduce_sum_(tensor, "test.in_place")
    assert tensor.asnumpy().tolist() == [SIZE() * (SIZE() + 1) / 2] * 3


def test_objects_of_another_type_on_each_rank_arrive() -> None:
    mine = {"from": 0} if RANK() == 0 else None
    for _ in range(3):  # one after the other without waiting: names must not meet
        assert dist.broadcast_object(mine) == {"from": 0}


def test_any_rank() -> None:
    assert dist.any_rank(RANK() == SIZE() - 1, "test.any")
    assert not dist.any_rank(False, "test.none")


def test_broadcast_after_an_inference_forward() -> None:
    """Horovod's own broadcast fails here: oneDNN has put the weight into its own layout."""
    mx.random.seed(RANK())
    net = mx.gluon.nn.Conv2D(16, kernel_size=3, in_channels=16)
    net.initialize(mx.init.Xavier())
    net(mx.nd.ones((2, 16, 8, 8))).wait_to_read()
    own = net.weight.data().asnumpy()
    dist.broadcast_parameters(net.collect_params().values())
    same = dist.allreduce_sum(net.weight.data().asnumpy(), "test.weights") / SIZE()
    np.testing.assert_allclose(same, net.weight.data().asnumpy(), rtol=1e-6)
    assert (RANK() == 0) == np.array_equal(own, net.weight.data().asnumpy())


def test_one_node_has_no_set_of_its_own() -> None:
    assert dist.local_size() == SIZE()
    assert dist.node_process_set() is None

"""Collectives between real Horovod ranks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import threading
from pathlib import Path
from typing import Tuple

import mxnet as mx
import numpy as np
import pytest

from tests.waiting import wait_until
from trainer import dist
from trainer.dist import collectives, preemption, small_sums
from trainer.dist.preemption import StopRequest
from trainer.step.optimizer import gluon_trainer

HOSTS = ((1, 1), (2, 2), (1, 1, 1), (2, 1))
RANK, SIZE = dist.rank, dist.world_size


def test_sum_over_ranks_keeps_dtype() -> None:
    for dtype in (np.float32, np.float64, np.int64):
        total = dist.allreduce_sum(np.array([RANK(), 1], dtype), f"test.{np.dtype(dtype).name}")
        assert total.dtype == dtype
        assert total.tolist() == [SIZE() * (SIZE() - 1) / 2, SIZE()]


@pytest.mark.parametrize("shape", [(), (0,), (3, 40_000)])
def test_sum_of_any_size_and_shape(shape: Tuple[int, ...]) -> None:
    own = np.random.RandomState(RANK()).normal(size=shape)
    total = dist.allreduce_sum(own, "test.shape")
    expected = sum(np.random.RandomState(rank).normal(size=shape) for rank in range(SIZE()))
    assert total.shape == shape
    np.testing.assert_allclose(total, expected, rtol=1e-12, atol=1e-14)


def test_sums_of_different_names_never_meet() -> None:
    assert dist.sums_are_cheap()
    with pytest.raises(RuntimeError, match=f"differ in what they add up; rank {RANK()}: test.of"):
        dist.allreduce_sum(np.ones(3), f"test.of {RANK()}")
    dist.barrier()  # and the next ones do


def test_arrays_of_more_chunks_on_one_rank_leave_all_in_step() -> None:
    with pytest.raises(RuntimeError, match="the ranks differ"):
        dist.allreduce_sum(np.ones(40_000 * (1 + RANK())), "test.chunks")
    assert dist.allreduce_sum(1, "test.after") == SIZE()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32])
def test_integers_whose_sum_does_not_fit_are_refused_on_every_rank(dtype: type) -> None:
    largest = np.iinfo(dtype).max
    given = np.array([largest if RANK() == 0 else 0], dtype)
    assert dist.allreduce_sum(given, "test.fits") == largest
    given[0] = largest // 2 + 1
    with pytest.raises(OverflowError, match="of test.large does not fit u?int.*; give int64"):
        dist.allreduce_sum(given, "test.large")
    dist.barrier()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "bool"])
def test_small_integers_in_arrays_of_mxnet_are_refused(dtype: str) -> None:
    with pytest.raises(TypeError, match=f"test.small is of {dtype}; give int32"):
        dist.allreduce_sum_(mx.nd.ones((2,)).astype(dtype), "test.small")


@pytest.mark.ranks(2)
def test_a_thread_that_adds_up_while_another_does_is_told() -> None:
    """Which sums belong together is told by their order; threads have none."""
    dist.barrier()
    if RANK() == 0:
        other = threading.Thread(target=dist.barrier)
        other.start()  # waits for rank 1
        wait_until(collectives._adding.locked, lambda: "it does not add up")
        with pytest.raises(RuntimeError, match="test.other is added up while another thread of ra"):
            dist.allreduce_sum(1, "test.other")
    small_sums.allreduce_by_horovod(np.zeros(1), "test.told")
    if RANK() == 0:
        other.join(30)
    else:
        dist.barrier()


def test_a_crash_in_a_forked_process_ends_it() -> None:
    """As of a library that reads pictures. MXNet's handler of signals would call exit(), in which
    Horovod waits for a thread that a forked process has not."""
    child = os.fork()
    if child == 0:
        caught = int(re.findall(r"SigCgt:\s*(\w+)", Path("/proc/self/status").read_text())[0], 16)
        if caught & 1 << (signal.SIGSEGV - 1):
            os._exit(1)
        ctypes.string_at(0)
    try:
        status = wait_until(lambda: os.waitpid(child, os.WNOHANG)[1], lambda: "it stays", 20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(status) == signal.SIGSEGV


def test_no_rank_is_taken_for_dead_while_it_lives() -> None:
    """Each holds a lock on the memory; it would be lost with any other descriptor of the file."""
    sums = small_sums.small_sums()
    assert sums is not None
    assert not any(sums._has_ended(peer) for peer in range(sums.size) if peer != sums.index)
    dist.barrier()


def test_ranks_go_on_after_an_error_that_all_have_caught() -> None:
    expected = ZeroDivisionError if RANK() == SIZE() - 1 else dist.PeerError
    with pytest.raises(expected), dist.together():
        1 / (RANK() - SIZE() + 1)
    tensor = mx.nd.ones((2,))
    dist.allreduce_sum_(tensor, "test.after_an_error")
    assert tensor.asnumpy().tolist() == [SIZE()] * 2


def test_ranks_share_memory_on_one_node_alone() -> None:
    assert dist.sums_are_cheap()
    assert dist.ranks_share_memory() == (dist.local_size() == SIZE())


def test_asynchronous_sum_replaces_its_argument() -> None:
    tensor = mx.nd.full((3,), RANK() + 1.0)
    dist.allreduce_sum_(tensor, "test.in_place")
    assert tensor.asnumpy().tolist() == [SIZE() * (SIZE() + 1) / 2] * 3


def test_sums_in_flight_together_are_to_the_bit_those_of_each_alone() -> None:
    """Fused into one, those of three ranks would be added up in another order."""
    drawn = np.random.RandomState(RANK()).normal(size=(8, 501)).astype(np.float32)
    alone = [dist.allreduce_sum_(mx.nd.array(own), "test.alone").asnumpy() for own in drawn]
    given = [mx.nd.array(own) for own in drawn]
    mx.nd.waitall()
    for number, tensor in enumerate(given):
        dist.allreduce_sum_(tensor, f"test.together{number}")
    for expected, found in zip(alone, given):
        np.testing.assert_array_equal(found.asnumpy(), expected)


def test_objects_of_another_type_on_each_rank_arrive() -> None:
    mine = {"from": 0} if RANK() == 0 else None
    assert dist.broadcast_object(mine) == {"from": 0}
    assert dist.gather_objects(mine) == [{"from": 0}] + [None] * (SIZE() - 1)


def test_objects_of_any_length_arrive() -> None:
    """Of one to eight bytes more than a whole number of those that are added up at once."""
    given = ["x" * (2**16 * rank + SIZE() + more) for rank in range(SIZE()) for more in range(8)]
    found = dist.gather_objects(given[8 * RANK() : 8 * RANK() + 8])
    assert [value for own in found for value in own] == given


def test_any_rank() -> None:
    assert dist.any_rank(RANK() == SIZE() - 1, "test.any")
    assert not dist.any_rank(False, "test.none")


@pytest.mark.parametrize("cheap", [True, False])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    cheap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "sums_are_cheap", lambda: cheap)
    with StopRequest() as stop:
        assert not stop.agreed()
        if RANK() == SIZE() - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert cheap or not stop.agreed()  # read a step later
        assert stop.agreed()
    mx.nd.waitall()


@pytest.fixture(params=["in memory", "by Horovod"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How arrays are broadcast, in turn."""
    if request.param == "by Horovod":
        monkeypatch.setattr(collectives, "ranks_share_memory", lambda: False)
    return request.param


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int32", "int64"])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (300_000,)])
def test_broadcast_gives_rank_0s_bits(way: str, dtype: str, shape: Tuple[int, ...]) -> None:
    drawn = [np.random.RandomState(rank).normal(size=shape) * 100 for rank in (0, RANK())]
    first, own = (mx.nd.array(values, dtype=dtype) for values in drawn)
    copy = dist.broadcast_array(own, f"test.{way}.{dtype}")
    assert copy.dtype == own.dtype and copy.shape == shape
    assert copy.asnumpy().tobytes() == first.asnumpy().tobytes()


def test_ranks_that_broadcast_different_arrays_are_told() -> None:
    with pytest.raises(RuntimeError, match="the ranks differ"):
        dist.broadcast_array(mx.nd.ones((2 + RANK(), 3)), "test.shapes")
    assert dist.any_rank(RANK() == 0, "test.after")  # they are still in step


@pytest.mark.parametrize("under_way", [False, True])
def test_broadcast_after_an_inference_forward(way: str, under_way: bool) -> None:
    """Horovod's own broadcast fails here: oneDNN has put the weight into its own layout."""
    mx.random.seed(RANK())
    net = mx.gluon.nn.Conv2D(16, kernel_size=3, in_channels=16)
    net.initialize(mx.init.Xavier())
    own = net.weight.data().asnumpy()
    if under_way and RANK() == 1:
        # Who still reads the weight holds up its new layout, which the forward asks for. A rank
        # whose broadcast failed alone would take the next one's numbers for this one's.
        large = mx.nd.ones((2000, 2000))
        mx.nd.dot(mx.nd.dot(large, large), large)[0, 0] * net.weight.data()
    net(mx.nd.ones((2, 16, 8, 8))).wait_to_read()
    dist.broadcast_parameters(net.collect_params().values())
    same = dist.allreduce_sum(net.weight.data().asnumpy(), "test.weights") / SIZE()
    np.testing.assert_allclose(same, net.weight.data().asnumpy(), rtol=1e-6)
    assert (RANK() == 0) == np.array_equal(own, net.weight.data().asnumpy())


@pytest.mark.one_node
def test_one_node_has_no_set_of_its_own() -> None:
    assert dist.local_size() == SIZE()
    assert dist.node_process_set() is None


def test_sparse_gradients_are_refused() -> None:
    """Horovod's sum of them ended in "free(): invalid size"."""
    parameter = mx.gluon.Parameter("words", shape=(20, 4), grad_stype="row_sparse")
    parameter.initialize()
    with pytest.raises(ValueError, match="gradients are sparse"):
        gluon_trainer({"words": parameter}, mx.optimizer.create("sgd"))


def test_a_net_on_several_devices_is_refused() -> None:
    """Its first step ended in a segmentation fault."""
    net = mx.gluon.nn.Dense(2, in_units=3)
    net.initialize(ctx=[mx.cpu(0), mx.cpu(1)])
    with pytest.raises(
        ValueError, match=r"the net is on cpu\(0\), cpu\(1\); a rank trains it on one"
    ):
        gluon_trainer(net.collect_params(), mx.optimizer.create("sgd"))

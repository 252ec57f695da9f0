"""Which device, how many threads. There is no GPU here: its driver's answers are faked."""

from __future__ import annotations

import os

import mxnet as mx
import pytest

from trainer import device, dist
from trainer.config import ConfigError


@pytest.fixture
def usable(monkeypatch):
    """Every GPU that is named can be computed on."""

    class Array:
        def wait_to_read(self):
            pass

    monkeypatch.setattr(mx.nd, "ones", lambda *_, **__: Array())


def line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_cpu_is_the_cpu_whatever_there_is(gpus):
    assert device.choose("cpu", 3, gpus) == mx.cpu()


def test_auto_without_gpus_is_the_cpu():
    assert device.choose("auto", 0, 0) == mx.cpu()
    assert device.choose("auto", 0) == mx.cpu()  # asks this machine's MXNet, which has none


def test_gpu_without_gpus_says_what_to_do():
    with pytest.raises(ConfigError) as error:
        device.choose("gpu", 0, 0)
    text = line(error)
    assert "device is gpu" in text and "device=cpu" in text and "GPU=1" in text


@pytest.mark.parametrize("asked", ["auto", "gpu"])
def test_ranks_of_a_node_take_its_gpus_in_turn(usable, asked):
    assert [device.choose(asked, rank, 4) for rank in range(4)] == [mx.gpu(i) for i in range(4)]


def test_rank_that_is_shown_one_gpu_takes_it(usable, monkeypatch):
    monkeypatch.setattr(dist, "local_size", lambda: 4)
    assert [device.choose("auto", rank, 1) for rank in range(4)] == [mx.gpu(0)] * 4


def test_more_ranks_than_gpus_are_refused(usable, monkeypatch):
    monkeypatch.setattr(dist, "local_size", lambda: 3)
    with pytest.raises(ConfigError, match="3 ranks on this node, 2 GPUs"):
        device.choose("auto", 0, 2)


@pytest.mark.parametrize("asked", ["auto", "gpu"])
def test_gpu_that_cannot_compute_is_named_with_the_way_out(asked):
    """The real error of an MXNet without CUDA stands for that of a GPU too new for it."""
    with pytest.raises(ConfigError) as error:
        device.choose(asked, 1, 2)
    text = line(error)
    assert "gpu(1)" in text and "NGC" in text and "compute capability" in text


def test_cuda_build_without_a_driver_has_no_gpus(monkeypatch):
    def fail():
        raise mx.MXNetError("no CUDA-capable device is detected")

    monkeypatch.setattr(mx.context, "num_gpus", fail)
    assert device.choose("auto", 0) == mx.cpu()


@pytest.mark.parametrize(
    "cores, ranks, threads", [(8, 1, "8"), (8, 2, "4"), (8, 3, "2"), (2, 5, "1")]
)
def test_cores_are_shared_among_the_ranks_of_the_node(monkeypatch, cores, ranks, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("HOROVOD_LOCAL_SIZE", str(ranks))
    device.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_number_of_threads_that_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    device.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7"

"""Running statistics of synced norm with a kernel that behaves as cuDNN's, which cannot run here.

By NVIDIA's manual: it moves running statistics in forward, the variance by the unbiased estimate,
and leaves them alone in backward. MXNet's CPU kernel does the rest of it.
"""

from __future__ import annotations

from typing import Any, Dict, List

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, nd
from mxnet.gluon import nn

from trainer import batch_norm
from trainer.batch_norm.rank_sum import RankSum
from trainer.config import Config, Optimizer
from trainer.data.augment.mixing import Mixed
from trainer.data.loader import Batch
from trainer.step import step
from trainer.step.optimizer import make_trainer
from trainer.step.step import train_step

STEPS = 30
REAL = nd.BatchNorm


def as_cudnn(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any, **options: Any) -> Any:
    """In the place of ``nd.BatchNorm``."""
    others = options.get("use_global_stats"), options.get("cudnn_off")  # are MXNet's own kernel's
    if autograd.is_training() and not any(others):
        old = np.float32(options.get("momentum", 0.9))
        axis = options.get("axis", 1)
        others = tuple(place for place in range(x.ndim) if place != axis % x.ndim)
        values = x.detach().asnumpy().astype(np.float64)
        count = values.size // gamma.size
        with np.errstate(all="ignore"):
            unbiased = values.var(others) * (np.float64(count) / (count - 1))
        for running, now in ((mean, values.mean(others)), (variance, unbiased)):
            moved = old * running.asnumpy() + (1 - old) * now
            running._sync_copyfrom(moved.astype(running.dtype))
        mean, variance = mean.copy(), variance.copy()  # which MXNet's kernel moves in backward
    return REAL(x, gamma, beta, mean, variance, **options)


def trained(
    monkeypatch: pytest.MonkeyPatch, switch: str, kernel: Any, samples: int, ranks: int
) -> Dict[str, np.ndarray]:
    """Running statistics after some steps of a rank whose peers have the same samples."""
    monkeypatch.setenv("BATCH_NORM_NATIVE", switch)
    monkeypatch.setattr(nd, "BatchNorm", kernel)
    monkeypatch.setattr(RankSum, "size", ranks)
    monkeypatch.setattr(RankSum, "_allreduce", lambda self, values, name="": ranks * values)
    monkeypatch.setattr(RankSum, "connect", lambda *_: None)
    monkeypatch.setattr(RankSum, "on_device", lambda self, array: ranks * array)
    net = batch_norm.convert_sync_batch_norm(nn.BatchNorm(in_channels=3))
    net.initialize()
    x = nd.array(np.random.RandomState(0).normal(1, 2, (samples, 3)))
    for _ in range(STEPS):
        with autograd.record():
            loss = (net(x) ** 2).sum()
        loss.backward()
    mx.nd.waitall()
    return {"mean": net.running_mean.data().asnumpy(), "var": net.running_var.data().asnumpy()}


def expected(samples: int) -> Dict[str, np.ndarray]:
    """As one process has it over all samples, on CPUs: the biased variance, once a step."""
    x = np.random.RandomState(0).normal(1, 2, (samples, 3)).astype(np.float32)
    kept = 0.9**STEPS
    return {"mean": (1 - kept) * x.mean(0), "var": kept + (1 - kept) * x.var(0)}


@pytest.mark.parametrize("kernel", [REAL, as_cudnn], ids=["CPU", "cuDNN"])
@pytest.mark.parametrize("samples, ranks", [(8, 2), (1, 2), (8, 1), (1, 1)])
@pytest.mark.parametrize("switch", ["device", "0"])
def test_both_kernels_give_the_running_statistics_of_all_samples(
    monkeypatch: pytest.MonkeyPatch, switch: str, kernel: Any, samples: int, ranks: int
) -> None:
    """Of a single sample too, of which cuDNN's variance is NaN."""
    for name, found in trained(monkeypatch, switch, kernel, samples, ranks).items():
        np.testing.assert_allclose(found, expected(samples)[name], rtol=1e-4, err_msg=name)


def test_the_stand_in_doubles_the_variance_of_two_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it could show nothing: this is what a pair of samples made of the moments comes to."""
    arrays = [nd.ones(1), nd.zeros(1), nd.zeros(1), nd.ones(1)]
    with autograd.train_mode():
        as_cudnn(nd.array([[-1.0, 1.0]]), *arrays, axis=0, momentum=0.0)
    assert arrays[3].asscalar() == 2


@pytest.mark.parametrize("mixed", [False, True])
def test_a_shard_of_one_sample_is_on_gpus_what_it_is_on_cpus(
    monkeypatch: pytest.MonkeyPatch, mixed: bool
) -> None:
    label = nd.array([1])
    mix = Mixed(nd.array([0]), nd.array([0.3])) if mixed else None
    batch = Batch(nd.random.normal(shape=(1, 3)), label, 1, 5, mixed=mix)

    def stepped(kernel: Any) -> List[np.ndarray]:
        monkeypatch.setattr(nd, "BatchNorm", kernel)
        net = nn.Sequential()
        net.add(nn.Dense(4, in_units=3), nn.BatchNorm(in_channels=4), nn.Dense(2, in_units=4))
        net.initialize(mx.init.One())
        config = Config(optimizer=Optimizer(momentum=0.0))
        result = train_step(net, make_trainer(net, config.optimizer), batch, config)
        arrays = [*result[:2], *(p.data() for p in net.collect_params().values())]
        return [array.asnumpy() for array in arrays]

    expected = stepped(REAL)
    monkeypatch.setattr(step, "CUDNN", "cpu")
    for value, other in zip(stepped(as_cudnn), expected):
        np.testing.assert_allclose(value, other, rtol=1e-6, atol=1e-7)

"""Running statistics of synced norm with a kernel that behaves as cuDNN's, which cannot run here.

By NVIDIA's manual: it moves running statistics in forward, the variance by the unbiased estimate,
and leaves them alone in backward. MXNet's CPU kernel does the rest of it.
"""

from __future__ import annotations

from typing import Any, Dict

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, nd
from mxnet.gluon import nn

from trainer import batch_norm
from trainer.batch_norm.rank_sum import RankSum

STEPS, SAMPLES = 30, 8
REAL = nd.BatchNorm


def as_cudnn(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any, **options: Any) -> Any:
    """In the place of ``nd.BatchNorm``."""
    if autograd.is_training() and not options.get("use_global_stats"):
        old = np.float32(options.get("momentum", 0.9))
        axis = options.get("axis", 1)
        others = tuple(place for place in range(x.ndim) if place != axis % x.ndim)
        values = x.detach().asnumpy().astype(np.float64)
        count = values.size // gamma.size
        unbiased = values.var(others) * count / (count - 1)
        for running, now in ((mean, values.mean(others)), (variance, unbiased)):
            moved = old * running.asnumpy() + (1 - old) * now
            running._sync_copyfrom(moved.astype(running.dtype))
    return REAL(x, gamma, beta, mean.copy(), variance.copy(), **options)  # moved in backward


def trained(monkeypatch: pytest.MonkeyPatch, switch: str, kernel: Any) -> Dict[str, np.ndarray]:
    """Running statistics after some steps of a rank whose peer has the same samples."""
    monkeypatch.setenv("BATCH_NORM_NATIVE", switch)
    monkeypatch.setattr(nd, "BatchNorm", kernel)
    monkeypatch.setattr(RankSum, "size", 2)
    monkeypatch.setattr(RankSum, "_allreduce", lambda self, values, name="": 2 * values)
    monkeypatch.setattr(RankSum, "connect", lambda *_: None)
    monkeypatch.setattr(RankSum, "on_device", lambda self, array: 2 * array)
    net = batch_norm.convert_sync_batch_norm(nn.BatchNorm(in_channels=3))
    net.initialize()
    x = nd.array(np.random.RandomState(0).normal(1, 2, (SAMPLES, 3)))
    for _ in range(STEPS):
        with autograd.record():
            loss = (net(x) ** 2).sum()
        loss.backward()
    mx.nd.waitall()
    return {"mean": net.running_mean.data().asnumpy(), "var": net.running_var.data().asnumpy()}


def expected() -> Dict[str, np.ndarray]:
    """As one process has it over all samples, on CPUs: the biased variance, once a step."""
    x = np.random.RandomState(0).normal(1, 2, (SAMPLES, 3)).astype(np.float32)
    kept = 0.9**STEPS
    return {"mean": (1 - kept) * x.mean(0), "var": kept + (1 - kept) * x.var(0)}


@pytest.mark.parametrize("kernel", [REAL, as_cudnn], ids=["CPU", "cuDNN"])
@pytest.mark.parametrize("switch", ["device", "0"])
def test_both_kernels_give_the_running_statistics_of_all_samples(
    monkeypatch: pytest.MonkeyPatch, switch: str, kernel: Any
) -> None:
    for name, found in trained(monkeypatch, switch, kernel).items():
        np.testing.assert_allclose(found, expected()[name], rtol=1e-4, err_msg=name)


def test_the_stand_in_doubles_the_variance_of_two_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it could show nothing: this is what a pair of samples made of the moments comes to."""
    arrays = [nd.ones(1), nd.zeros(1), nd.zeros(1), nd.ones(1)]
    with autograd.train_mode():
        as_cudnn(nd.array([[-1.0, 1.0]]), *arrays, axis=0, momentum=0.0)
    assert arrays[3].asscalar() == 2

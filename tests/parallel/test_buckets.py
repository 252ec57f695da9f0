"""Allreduce of gradients in buckets, through Horovod, on real ranks."""

from __future__ import annotations

import pickle
import random
import time
from typing import Any, List

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from trainer import config, dist
from trainer.dist import half_sum
from trainer.dist.array_memory import memory_of
from trainer.errors import ConfigError
from trainer.model import prepare
from trainer.mxnet_internals import allreduce_of, trained_parameters
from trainer.step import buckets, momentum
from trainer.step.gradients import mean_gradients, reduce_and_update
from trainer.step.optimizer import gluon_trainer, make_trainer

RANKS = (3,)
BATCH = 6  # samples of each rank


def net_of(dtype: str = "float32") -> gluon.Block:
    mx.random.seed(0)
    net = nn.HybridSequential()
    net.add(nn.Dense(7, activation="tanh", in_units=5), nn.Dense(9, in_units=7))
    net.add(nn.BatchNorm(in_channels=9), nn.Dense(3, in_units=9))
    net.initialize(mx.init.Xavier())
    net[3].cast(dtype)
    return net


def data(rank: int) -> mx.nd.NDArray:
    return mx.nd.array(np.random.RandomState(rank).normal(size=(BATCH, 5)))


def backward(net: gluon.Block, rank: int, dtype: str = "float32") -> None:
    with autograd.record():
        hidden = data(rank)
        for layer in list(net)[:3]:
            hidden = layer(hidden)
        loss = (net[3](hidden.astype(dtype)).astype("float32") ** 2).sum()
    loss.backward()


def trainer_of(net: gluon.Block, bucket_mb: float, **arguments: Any) -> gluon.Trainer:
    sgd = mx.optimizer.create("sgd", learning_rate=0.01, momentum=0.9)
    parameters = net.collect_params()
    return gluon_trainer(parameters, sgd, bucket_mb=bucket_mb, shared_memory=False, **arguments)


def expected(dtype: str = "float32") -> List[np.ndarray]:
    """The sums over ranks, computed by this rank alone."""
    net = net_of(dtype)
    trained = [p for p in net.collect_params().values() if p.grad_req != "null"]
    sums = [np.zeros(p.shape) for p in trained]
    for rank in range(dist.world_size()):
        backward(net, rank, dtype)
        for total, parameter in zip(sums, trained):
            total += parameter.grad().asnumpy()
    return sums


def test_gradients_of_two_nets_may_travel_at_once() -> None:
    """As of a generator and a discriminator; and a process may have had other trainers before."""
    for _ in range(dist.rank()):
        next(buckets._fillings)
    nets = [net_of(), net_of()]
    trainers = [trainer_of(net, 4) for net in nets]
    for _ in range(3):
        for net in nets:
            backward(net, dist.rank())
        mx.nd.waitall()
        for trainer in trainers:
            trainer.allreduce_grads()
        for net in nets:
            trained = [p for p in net.collect_params().values() if p.grad_req != "null"]
            for parameter, total in zip(trained, expected()):
                np.testing.assert_allclose(parameter.grad().asnumpy(), total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", ["no", "static_alloc", "static_shape"])
@pytest.mark.parametrize("bucket_mb", [1e-5, 2e-4, 4])
def test_gradients_are_summed_in_every_step(bucket_mb: float, compiled: str) -> None:
    net = net_of()
    if compiled != "no":
        for layer in net:
            layer.hybridize(static_alloc=True, static_shape=compiled == "static_shape")
    trainer = trainer_of(net, bucket_mb)
    for _ in range(3):
        backward(net, dist.rank())
        trainer.allreduce_grads()
        trained = [p for p in net.collect_params().values() if p.grad_req != "null"]
        for parameter, total in zip(trained, expected()):
            np.testing.assert_allclose(parameter.grad().asnumpy(), total, rtol=1e-4, atol=1e-5)


def test_mean_is_over_ranks_and_unused_gradients_are_zero() -> None:
    """The last layer's gradients stay from the first step, in which it was used."""
    net = net_of()
    trainer = trainer_of(net, 4)
    for used in (4, 2):
        with autograd.record():
            hidden = data(dist.rank())
            for layer in list(net)[:used]:
                hidden = layer(hidden)
            loss = hidden.sum()
        loss.backward()
        reduce_and_update(trainer, None, want_norm=True)
    mean = mean_gradients(trainer)
    assert not mean[net[3].weight.name].any()
    np.testing.assert_allclose(mean[net[1].bias.name], BATCH, rtol=1e-6)


def test_gradients_that_are_accumulated_and_frozen_between_steps() -> None:
    net = net_of()
    for parameter in net.collect_params().values():
        if parameter.grad_req != "null":
            parameter.grad_req = "add"
    trainer = trainer_of(net, 1e-5)
    first, second = (net[index].weight for index in (0, 1))
    for frozen in (False, True, False):
        first.grad_req = "null" if frozen else "add"
        net.collect_params().zero_grad()
        for _ in range(2):
            backward(net, dist.rank())
        trainer.allreduce_grads()
        sums = expected()
        np.testing.assert_allclose(second.grad().asnumpy(), 2 * sums[2], rtol=1e-4, atol=1e-5)
        if not frozen:
            np.testing.assert_allclose(first.grad().asnumpy(), 2 * sums[0], rtol=1e-4, atol=1e-5)


def test_each_dtype_is_summed_in_its_own() -> None:
    net = net_of("float64")
    trainer = trainer_of(net, 4)
    backward(net, dist.rank(), "float64")
    trainer.allreduce_grads()
    trained = [p for p in net.collect_params().values() if p.grad_req != "null"]
    for parameter, total in zip(trained, expected("float64")):
        assert np.dtype(parameter.grad().dtype) == np.dtype(parameter.dtype)
        np.testing.assert_allclose(parameter.grad().asnumpy(), total, rtol=1e-4, atol=1e-5)


def test_one_call_updates_what_is_alike_in_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nesterov's momentum, on CPUs as on GPUs: with the bits of a call for each parameter."""
    kernel, sizes, found = mx.nd.nag_mom_update, [], []
    monkeypatch.setattr(
        mx.nd, "nag_mom_update", lambda *a, **named: sizes.append(a[0].size) or kernel(*a, **named)
    )
    for where in ("cpu", "gpu"):
        monkeypatch.setattr(momentum.NAG, "joined_on", where)
        net = net_of()
        settings = config.Optimizer(nesterov=True, shared_memory=False, bucket_mb=2e-4)
        trainer = make_trainer(net, settings)
        for step in range(3):
            backward(net, step * dist.world_size() + dist.rank())
            reduce_and_update(trainer, None, step == 1)
        found.append([p.data().asnumpy() for p in trained_parameters(trainer)])
        if where == "cpu":
            buckets_of = allreduce_of(trainer).planned()
            factors = [{(p.lr_mult, p.wd_mult) for p in bucket} for bucket in buckets_of]
            assert len(sizes) == 3 * sum(map(len, factors)) < 3 * sum(map(len, buckets_of))
    for joined, alone in zip(*found):
        np.testing.assert_array_equal(joined, alone)


def test_the_first_layers_bucket_is_the_last() -> None:
    net = net_of()
    trainer = trainer_of(net, 1e-5)
    backward(net, dist.rank())
    trainer.allreduce_grads()
    reduce = allreduce_of(trainer)
    names = sorted(p.name for p in net.collect_params().values())
    numbers = {name: reduce.place_of(index).bucket for index, name in enumerate(names)}
    used = [net[index].weight.name for index in (3, 1, 0)]
    assert [numbers[name] for name in used] == sorted(numbers[name] for name in used)
    assert numbers[used[0]] < numbers[used[1]] < numbers[used[2]]


def test_a_bucket_that_is_held_back_waits_for_the_first_layers_gradients() -> None:
    late, first = mx.nd.ones(5), mx.nd.ones((3,), dtype="float64")
    mx.nd.waitall()
    dist.barrier()
    began = time.monotonic()
    if dist.rank() == 1:
        time.sleep(1)
    dist.allreduce_sum_(first, "first layers")
    buckets._wait_for(late, first)
    late += 1
    late.wait_to_read()
    assert time.monotonic() - began > 0.9
    np.testing.assert_array_equal(late.asnumpy(), 2)


@pytest.mark.parametrize("shared_memory", [False, True])
def test_ranks_that_freeze_other_layers_are_told(shared_memory: bool) -> None:
    """Also where as many numbers are left to be added up."""
    made = [gluon.Parameter(f"p{number}", shape=(3,)) for number in range(2)]
    for parameter in made:
        parameter.initialize()
    made[dist.rank() == 1].grad_req = "null"
    named, sgd = {parameter.name: parameter for parameter in made}, mx.optimizer.create("sgd")
    trainer = gluon_trainer(named, sgd, shared_memory=shared_memory)
    with pytest.raises(ConfigError, match="trains other parameters than"):
        trainer.allreduce_grads()


def test_a_pickled_trainer_makes_its_buckets_anew() -> None:
    net = net_of()
    trainer = trainer_of(net, 4)
    backward(net, dist.rank())
    trainer.allreduce_grads()
    reduce = pickle.loads(pickle.dumps(allreduce_of(trainer)))
    assert reduce._buckets == []


def test_every_run_gives_the_same_bits_whenever_gradients_are_ready() -> None:
    """On three ranks or more, fusion would order sums by what is ready together."""
    made = [gluon.Parameter(f"p{index}", shape=(501,)) for index in range(24)]
    for parameter in made:
        parameter.initialize()
    sgd = mx.optimizer.create("sgd")
    named = {parameter.name: parameter for parameter in made}
    trainer = gluon_trainer(named, sgd, bucket_mb=1e-3, shared_memory=False)
    drawn = np.random.RandomState(dist.rank()).normal(size=(24, 501)).astype(np.float32)
    drawn *= 10.0 ** np.arange(24)[:, np.newaxis]
    delay = random.Random(dist.rank())
    sums = []
    for _ in range(12):
        for parameter, values in zip(made, drawn):
            parameter.grad()[:] = values
        mx.nd.waitall()
        time.sleep(delay.uniform(0, 0.005))
        trainer.allreduce_grads()
        sums.append([parameter.grad().asnumpy() for parameter in made])
    for found in sums[1:]:
        for one, other in zip(sums[0], found):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float16_on_the_wire_rounds_sums_of_float32(
    compiled: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, in two roundings; otherwise by MXNet's casts and Horovod's sum of float16."""
    if not compiled:
        monkeypatch.setattr(half_sum, "library", lambda: None)
    made = [gluon.Parameter(f"p{n}", shape=(n,), dtype=dtype) for n in (1, 37, 501, 8, 1000)]
    for parameter in made:
        parameter.initialize()
    sgd, named = mx.optimizer.create("sgd"), {parameter.name: parameter for parameter in made}
    trainer = gluon_trainer(named, sgd, fp16=True, bucket_mb=1e-3)
    for step in range(3):
        every = [
            [np.random.RandomState(10 * step + rank).normal(size=p.shape) for p in made]
            for rank in range(dist.world_size())
        ]
        for parameter, values in zip(made, every[dist.rank()]):
            parameter.grad()[:] = values
        trainer.allreduce_grads()
        for parameter, *values in zip(made, *every):
            found = parameter.grad().asnumpy()
            total = np.sum([value.astype("f4").astype("f2").astype("f4") for value in values], 0)
            if compiled and dtype == "float32":
                np.testing.assert_array_equal(found, total.astype(np.float16))
            else:  # which rounds in each of Horovod's steps
                np.testing.assert_allclose(found, total, atol=0.01)
            assert np.dtype(found.dtype) == dtype
            assert (found == found.astype(np.float16)).all()


def test_large_gradients_in_float16_become_infinite_and_small_ones_stay() -> None:
    parameter = gluon.Parameter("p", shape=(3,))
    parameter.initialize()
    trainer = gluon_trainer({"p": parameter}, mx.optimizer.create("sgd"), fp16=True)
    parameter.grad()[:] = mx.nd.array([1e6, 6e-8, np.nan])
    trainer.allreduce_grads()
    large, small, undefined = parameter.grad().asnumpy()
    assert np.isinf(large) and 0 < small < 1e-6 and np.isnan(undefined)


def test_the_last_layers_gradients_are_there_before_the_first_ones() -> None:
    """Otherwise the wire would be idle until most of backward is done."""
    net = nn.HybridSequential()
    for _layer in range(6):
        net.add(nn.Dense(1000, in_units=1000, use_bias=False))
    settings = config.from_dict({"optimizer": {"shared_memory": False}, "data": {"image_size": 32}})
    prepare.prepare_net(net, settings, (1, 25, 40), mx.cpu())
    first, last = (net[number].weight.grad() for number in (0, 5))
    for _step in range(2):  # the first one compiles
        memory = memory_of(first)
        memory[...] = np.nan
        with autograd.record():
            loss = net(mx.nd.ones((256, 1, 25, 40))).sum()
        loss.backward()
        last.wait_to_read()
        untouched = bool(np.isnan(memory[-1, -1]))
        mx.nd.waitall()
        assert np.isfinite(memory).all()
    assert untouched


class _Two(gluon.HybridBlock):
    """Gives what its first layer gives, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Dense(5, in_units=5), nn.Dense(3, in_units=5)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        hidden = self.first(x)
        return hidden, self.last(hidden)


def test_forward_begins_while_the_last_layers_sum_is_on_its_way() -> None:
    net = _Two()
    net.initialize()
    settings = config.from_dict({"optimizer": {"shared_memory": False}})
    net.hybridize(static_alloc=True, **prepare._bulks(settings, mx.cpu()))
    for _step in range(2):  # the first one compiles
        mx.nd.waitall()
        under_way = mx.nd.ones(4)
        if dist.rank() == 1:
            dist.barrier()
        dist.allreduce_sum_(under_way, "last layers")
        buckets._wait_for(net.last.weight.data().reshape(-1), under_way)
        hidden, scores = net(mx.nd.ones((2, 5)))
        if dist.rank() != 1:
            hidden.wait_to_read()  # for ever, if it waited for rank 1, which waits for this one
            dist.barrier()
        assert np.isfinite(scores.asnumpy()).all()

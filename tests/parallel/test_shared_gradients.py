"""Allreduce of gradients in memory shared by real ranks."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from pathlib import Path
from typing import Any, Iterator, List, Mapping, Sequence

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from tests.waiting import wait_until
from trainer import dist
from trainer.config import Config, Optimizer, Train
from trainer.d2l import train_ch5
from trainer.data.idx_file import DataError
from trainer.dist.shared_memory import SharedMemorySum
from trainer.run.loop import fit
from trainer.run.outcome import Result, TrainingError
from trainer.step import gradient_rows, momentum, shared_gradients
from trainer.step.gradients import mean_gradients, reduce_and_update
from trainer.step.optimizer import gluon_trainer, make_trainer
from trainer.step.timing import unmarked

RANKS = (2, 3)
RANK, SIZE = dist.rank, dist.world_size
SHAPES = [(700, 900), (3,), (1, 1), (5, 7)]
DTYPES = ["float32", "float32", "float64", "float64"]


def parameters() -> List[gluon.Parameter]:
    """More numbers than a block holds, fewer than ranks; of both kinds; one that is not trained."""
    made = [
        gluon.Parameter(f"p{i}", shape=shape, dtype=dtype)
        for i, (shape, dtype) in enumerate(zip(SHAPES, DTYPES))
    ]
    made.append(gluon.Parameter("fixed", shape=(2,), grad_req="null"))
    for parameter in made:
        parameter.initialize()
    return made


def trainer_of(made: Sequence[gluon.Parameter], shared: bool = True, bucket_mb: float = 4) -> Any:
    sgd = mx.optimizer.create("sgd", learning_rate=0.01, momentum=0.9)
    named = {parameter.name: parameter for parameter in made}
    return gluon_trainer(named, sgd, False, bucket_mb, shared)


@pytest.mark.parametrize("bucket_mb", [1e-5, 4])
def test_sums_are_those_through_horovod(bucket_mb: float) -> None:
    sums = []
    for shared in (True, False):
        made = parameters()
        trainer = trainer_of(made, shared, bucket_mb)
        for calls in (1, 2):  # the memory is used again
            for parameter in made[:4]:
                drawn = np.random.RandomState(10 * calls + RANK()).normal(size=parameter.shape)
                parameter.grad()[:] = drawn
            trainer.allreduce_grads()
            sums.append([p.grad().asnumpy() for p in made[:4]])
        assert (getattr(trainer._allreduce_grads, "_shared", None) is not None) == shared
    for ours, horovods in zip(sums[:2], sums[2:]):
        for one, other in zip(ours, horovods):
            assert one.dtype == other.dtype
            if SIZE() == 2:
                assert np.array_equal(one, other)
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.ranks(3)
def test_nobody_overwrites_what_a_late_rank_still_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank is late in turn, after each barrier."""
    made = parameters()
    trainer = trainer_of(made)
    late = np.random.RandomState(RANK())
    barrier = SharedMemorySum.barrier

    def late_after(peers: SharedMemorySum) -> None:
        barrier(peers)
        if late.randint(4) == 0:
            time.sleep(0.01)

    monkeypatch.setattr(SharedMemorySum, "barrier", late_after)
    for step in range(40):
        for number, parameter in enumerate(made[:4]):
            parameter.grad()[:] = (step + number) * (RANK() + 1)
        trainer.allreduce_grads()
        for number, parameter in enumerate(made[:4]):
            expected = (step + number) * SIZE() * (SIZE() + 1) / 2
            assert (parameter.grad().asnumpy() == expected).all(), (step, number)


def convolutions() -> nn.HybridSequential:
    mx.random.seed(1)
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.Conv2D(16, 3, in_channels=1, use_bias=False), nn.BatchNorm(in_channels=16))
        net.add(nn.Activation("relu"), nn.Conv2D(16, 3, in_channels=16), nn.Dense(4, in_units=256))
    net.initialize(mx.init.Xavier())
    return net


def trained(shared: bool, looking: bool, grad_req: str, **hybridize: Any) -> List[np.ndarray]:
    """Weights and gradients after some steps, with passes in inference between them."""
    net = convolutions()
    if hybridize:
        net.hybridize(**hybridize)
    net.collect_params().setattr("grad_req", grad_req)
    net.collect_params(".*running.*").setattr("grad_req", "null")
    made = list(net.collect_params().values())
    trainer = trainer_of(made, shared)
    draw = np.random.RandomState(RANK())
    for _step in range(5):
        for _part in range(2 if grad_req == "add" else 1):
            data = mx.nd.array(draw.normal(size=(4, 1, 8, 8)))
            with autograd.record():
                loss = (net(data) ** 2).mean()
            loss.backward()
        trainer.step(1)
        if grad_req == "add":
            net.collect_params().zero_grad()
        if looking:
            net(data)  # oneDNN brings weights into an order of its own
    mx.nd.waitall()  # weights that are read during a forward may be out of order
    moved = [p for p in made if p.grad_req != "null"]
    return [p.data().asnumpy() for p in moved] + [p.grad().asnumpy() for p in moved]


@pytest.mark.ranks(2)  # whose sums have one order
@pytest.mark.parametrize("looking", [False, True])
@pytest.mark.parametrize("grad_req", ["write", "add"])
@pytest.mark.parametrize(
    "hybridize", [{}, {"static_alloc": True}, {"static_alloc": True, "static_shape": True}]
)
def test_a_net_is_trained_as_through_horovod(looking: bool, grad_req: str, hybridize: dict) -> None:
    ours, horovods = (trained(shared, looking, grad_req, **hybridize) for shared in (True, False))
    for one, other in zip(ours, horovods):
        assert np.isfinite(one).all() and np.array_equal(one, other)


def stepped(nesterov: bool, reading: bool) -> List[np.ndarray]:
    """Weights and mean gradients after steps of fit's own, every third of which is reported."""
    net = convolutions()
    net.hybridize(static_alloc=True)
    trainer = make_trainer(net, Optimizer(lr=0.001, nesterov=nesterov, weight_decay=0.01))
    draw = np.random.RandomState(RANK())
    for step in range(10):
        data = mx.nd.array(draw.normal(size=(4, 1, 8, 8)))
        with autograd.record():
            loss = (net(data) ** 2).mean()
        loss.backward()
        reported = step % 3 == 0
        reduce_and_update(trainer, None, reported, unmarked if reading else lambda part: None)
        if reported:
            net(data)  # oneDNN brings weights into an order of its own
    mx.nd.waitall()
    found = [p.data().asnumpy() for p in net.collect_params().values()]
    return [*found, *mean_gradients(trainer).values()]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> List[int]:
    """Grows with each update that reads the sums where they are."""
    seen: List[int] = []
    summed = gradient_rows.Rows.summed

    def noted(rows: gradient_rows.Rows, indices: Mapping[int, int]) -> Any:
        seen.extend([1] if indices else [])
        return summed(rows, indices)

    monkeypatch.setattr(gradient_rows.Rows, "summed", noted)
    return seen


@pytest.mark.ranks(3)
@pytest.mark.parametrize("nesterov", [False, True])
def test_updates_from_the_sums_give_the_same_bits(
    nesterov: bool, read: List[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    apart_from_it = stepped(nesterov, reading=False)
    assert not read
    late, barrier = np.random.RandomState(RANK()), SharedMemorySum.barrier

    def late_after(peers: SharedMemorySum) -> None:
        barrier(peers)
        if late.randint(3) == 0:
            time.sleep(0.01)

    monkeypatch.setattr(SharedMemorySum, "barrier", late_after)
    in_it = stepped(nesterov, reading=True)
    assert len(read) == 6
    for one, other in zip(in_it, apart_from_it):
        assert np.isfinite(one).all() and np.array_equal(one, other)


@pytest.mark.ranks(3)
def test_all_ranks_update_from_the_sums_or_none(
    read: List[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has no compiler, say."""
    whole = stepped(nesterov=False, reading=True)
    read.clear()
    if RANK() == SIZE() - 1:
        monkeypatch.setattr(momentum, "library", lambda: None)
    for one, other in zip(stepped(nesterov=False, reading=True), whole):
        assert np.array_equal(one, other)
    assert not read


@pytest.fixture
def numpy_semantics() -> Iterator[None]:
    mx.npx.set_np()
    yield
    mx.npx.reset_np()


@pytest.mark.ranks(3)
def test_nets_of_mxnets_numpy_kind(numpy_semantics: None) -> None:
    scale = gluon.Parameter("scale", shape=())
    net = nn.Dense(3, in_units=2)
    scale.initialize()
    net.initialize()
    trainer = trainer_of([*net.collect_params().values(), scale])
    for step in (1, 2):
        with autograd.record():
            loss = (net(mx.np.ones((1, 2))) * scale.data()).sum() * (RANK() + step)
        loss.backward()
        weights, factor = net.weight.data().asnumpy(), float(scale.data())
        output = float(net(mx.np.ones((1, 2))).sum())
        trainer.allreduce_grads()
        ranks = sum(range(step, SIZE() + step))
        np.testing.assert_allclose(net.weight.grad().asnumpy(), np.full((3, 2), ranks * factor))
        np.testing.assert_allclose(float(scale.grad()), ranks * output, rtol=1e-5, atol=1e-5)
        assert type(net.weight.grad()) is mx.np.ndarray
        trainer.update(1)
        assert not np.array_equal(net.weight.data().asnumpy(), weights)


@pytest.mark.ranks(3)
def test_parameters_may_be_frozen_and_thawed() -> None:
    made = parameters()
    trainer = trainer_of(made)

    def check(moved: Sequence[int]) -> None:
        for number in moved:
            made[number].grad()[:] = number + RANK()
        trainer.allreduce_grads()
        for number in moved:
            expected = number * SIZE() + SIZE() * (SIZE() - 1) / 2
            assert (made[number].grad().asnumpy() == expected).all()

    check((0, 1, 2, 3))
    made[1].grad_req = "null"
    check((0, 2, 3))
    made[1].grad_req = "write"
    check((0, 1, 2, 3))
    made[4].grad_req = "write"
    check((0, 1, 2, 3, 4))


@pytest.mark.ranks(3)
def test_two_trainers_may_take_turns() -> None:
    nets = [parameters(), parameters()]
    trainers = [trainer_of(made) for made in nets]
    for step in range(3):
        for number, (made, trainer) in enumerate(zip(nets, trainers)):
            made[0].grad()[:] = 10 * step + number + RANK()
            trainer.allreduce_grads()
            expected = (10 * step + number) * SIZE() + SIZE() * (SIZE() - 1) / 2
            assert (made[0].grad().asnumpy() == expected).all()


def shared_files() -> List[os.stat_result]:
    """This process's open files of memory that is shared."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the folder listed is closed by now
            if os.readlink(f"/proc/self/fd/{number}").startswith("/memfd:ranks_"):
                found.append(os.fstat(int(number)))
    return found


def taken_since(before: Sequence[os.stat_result]) -> int:
    """Bytes of memory behind what is shared since; files of ``before`` may be closed meanwhile."""
    known = {file.st_ino for file in before}
    return sum(512 * file.st_blocks for file in shared_files() if file.st_ino not in known)


@pytest.mark.ranks(2)
def test_two_trainers_of_the_same_parameters_take_bounded_memory() -> None:
    made = parameters()
    trainers = [trainer_of(made), trainer_of(made[1:3])]
    gc.collect()
    before = len(shared_files())
    for step in range(shared_gradients._MOVES + 10):
        for trainer in trainers:
            made[2].grad()[:] = step + RANK()
            trainer.allreduce_grads()
            expected = step * SIZE() + SIZE() * (SIZE() - 1) / 2
            assert (made[2].grad().asnumpy() == expected).all()
    # One for each mapping of each trainer, a few for where the ranks meet.
    assert len(shared_files()) - before < 2 * shared_gradients._MOVES + 10


@pytest.mark.ranks(3)
def test_a_gradient_read_before_the_sum_is_this_ranks() -> None:
    parameter = gluon.Parameter("p", shape=(1500, 1500))
    parameter.initialize()
    trainer = trainer_of([parameter])
    for _ in range(8):
        parameter.grad()[:] = 1
        root = (parameter.grad() ** 2).sqrt()
        own = parameter.grad() * root  # asynchronous, and slower than the ranks' meeting
        trainer.allreduce_grads()
        assert (own.asnumpy() == 1).all()
        assert (parameter.grad().asnumpy() == SIZE()).all()


def test_released_memory_is_free_and_the_net_trains_on() -> None:
    made = parameters()
    trainer = trainer_of(made)
    made[0].grad()[:] = RANK() + 1
    before = shared_files()
    dist.barrier()
    trainer.allreduce_grads()
    kept = made[0].grad()
    numbers = SIZE() * 700 * 900
    assert taken_since(before) > 4 * numbers
    dist.barrier()
    shared_gradients.release(trainer)
    dist.barrier()
    assert taken_since(before) < 2**16  # where the ranks met
    dist.barrier()
    total = SIZE() * (SIZE() + 1) / 2
    assert (made[0].grad().asnumpy() == total).all()
    assert kept.shape == SHAPES[0] and (kept.asnumpy() == 0).all()  # no crash, and nothing of it
    trainer.allreduce_grads()
    assert (made[0].grad().asnumpy() == total * SIZE()).all()


@pytest.mark.ranks(2)
def test_the_books_function_leaves_no_memory_taken() -> None:
    dist.barrier()
    before = shared_files()
    dist.barrier()
    batches = [(mx.nd.ones((6, 1, 8, 8)), mx.nd.zeros(6))]
    net = nn.Sequential()
    net.add(nn.Dense(20_000), nn.Dense(10))
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 1e-4})
    train_ch5(net, batches, batches, 6, trainer, mx.cpu(), 1)
    wait_until(
        lambda: taken_since(before) < 2**20, lambda: f"{taken_since(before)} bytes are taken"
    )
    dist.barrier()


@pytest.mark.ranks(2)
def test_after_runs_that_fail_the_next_one_trains_and_their_memory_is_free(tmp_path: Path) -> None:
    """Somebody who tries learning rates in a notebook may have many of them."""
    dist.barrier()
    before = shared_files()
    dist.barrier()
    images, labels = np.zeros((64, 8, 8), np.uint8) + 200, np.arange(64) % 10
    net = nn.HybridSequential()
    net.add(nn.Dense(20_000), nn.Dense(10))

    def run(rate: float, labels: np.ndarray = labels) -> Result:
        made = Optimizer(lr=rate), Train(epochs=1, global_batch_size=16)
        settings = Config(output=str(tmp_path), optimizer=made[0], train=made[1])
        return fit(net, settings, train=(images, labels), test=(images, labels), resume="none")

    with pytest.raises(TrainingError, match="not finite"):
        run(rate=1e30)
    wait_until(
        lambda: taken_since(before) < 2**20, lambda: f"{taken_since(before)} bytes are taken"
    )
    assert net[0].weight.grad().shape == (20_000, 64)
    with pytest.raises((DataError, dist.PeerError), match="labels"):  # of one rank alone
        run(0.01, labels if RANK() else labels[1:])
    net.initialize(force_reinit=True)
    assert run(0.01).steps == 4

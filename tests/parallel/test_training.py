"""A run is a function of config and seed, not of the number of ranks."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any, Callable, List, Tuple

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn

from tests.processor import needs_bfloat16
from tests.transformed import Transform
from trainer import EpochEnd, batch_norm, checkpoint, config, dist, fit
from trainer.checkpoint import resume
from trainer.data import input_pipeline
from trainer.data.idx_file import DataError
from trainer.data.loader import Batch, EvalLoader, TrainLoader
from trainer.data.sources.base import ArraySource
from trainer.dist.array_memory import on_device
from trainer.errors import ConfigError
from trainer.model import mixed_precision, prepare, replica
from trainer.mxnet_internals import ordered_parameters
from trainer.run import agreement
from trainer.step.evaluation import built_in, evaluate
from trainer.step.metrics import TrainMetrics
from trainer.step.optimizer import make_optimizer, make_trainer
from trainer.step.step import train_step

RANKS = (2, 3)
HOSTS = ((1, 1),)
SIZE = 103  # samples: neither the batch nor any number of ranks divides it
SETTINGS: dict = {
    "train": {"global_batch_size": 17, "epochs": 2},
    "data": {"pad_crop": 2, "flip": True, "erase": 0.5},
    "optimizer": {"lr": 0.1, "nesterov": True, "weight_decay": 1e-3},
}


def _set(seed: int = 0) -> Tuple[np.ndarray, np.ndarray]:
    draw = np.random.RandomState(seed)
    return draw.randint(0, 256, (SIZE, 8, 8)).astype(np.uint8), draw.randint(0, 4, SIZE)


def _loader(settings: config.Config, rank: int, world_size: int) -> TrainLoader:
    return TrainLoader(
        ArraySource(*_set()),
        settings.data,
        global_batch_size=settings.train.global_batch_size,
        seed=settings.seed,
        rank=rank,
        world_size=world_size,
        parts=settings.optimizer.accumulate,
        place=on_device(mx.cpu()),
    )


def _net() -> gluon.Block:
    """Without batch norm; its activations are smooth, so that rounding stays rounding."""
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3, activation="tanh"), nn.Flatten(), nn.Dense(4))
    return net


def _train(settings: config.Config, rank: int, world_size: int) -> Tuple[List[Any], List[float]]:
    """Weights and losses after all epochs; on (0, 1) this rank does all on its own."""
    loader, net = _loader(settings, rank, world_size), _net()
    prepare.prepare_net(net, settings, loader.shape, mx.cpu())
    if world_size == 1:
        trainer = gluon.Trainer(
            net.collect_params(), make_optimizer(settings.optimizer), kvstore=None
        )
        for parameter in net.collect_params().values():
            parameter.wd_mult = 1.0 if len(parameter.shape) > 1 else 0.0
            parameter.lr_mult = 0.5 if settings.optimizer.lr_mult and parameter.wd_mult else 1.0
    else:
        trainer = make_trainer(net, settings.optimizer)
    losses = []
    steps = settings.train.epochs * loader.steps_per_epoch
    with mixed_precision.computing_in(net, settings.train.precision):
        for step, batch in enumerate(loader.from_step(0, steps)):
            if world_size == 1:
                losses.append(_plain_step(net, trainer, batch))
            else:
                metrics = TrainMetrics(mx.cpu())
                result = train_step(net, trainer, batch, settings)
                metrics.add(step, result, batch.samples)
                losses.append(metrics.read().loss)
    return [p.data().asnumpy() for p in net.collect_params().values()], losses


def _plain_step(net: gluon.Block, trainer: gluon.Trainer, batch: Batch) -> float:
    """What a Gluon tutorial writes for one process; nothing of the project's own step."""
    label = mx.nd.one_hot(batch.label, 4)
    if batch.mixed is not None:
        share = batch.mixed.share.expand_dims(1)
        label = share * label + (1 - share) * mx.nd.one_hot(batch.mixed.label, 4)
    with mx.autograd.record():
        loss = gluon.loss.SoftmaxCrossEntropyLoss(sparse_label=False)(net(batch.data), label)
    loss.backward()
    trainer.step(len(batch.label))
    return float(loss.mean().asscalar())


def _agree(settings: config.Config, rtol: float = 1e-5) -> float:
    """The largest difference of a weight from one process's, if all are that close."""
    weights, losses = _train(settings, dist.rank(), dist.world_size())
    expected, expected_losses = _train(settings, 0, 1)
    np.testing.assert_allclose(losses, expected_losses, rtol=rtol)
    difference = np.max([np.abs(ours - theirs).max() for ours, theirs in zip(weights, expected)])
    assert difference < rtol
    return difference


def test_ranks_visit_each_sample_exactly_once_an_epoch() -> None:
    # Without augmentation a sample is known by its pixels.
    settings = config.from_dict({**SETTINGS, "data": {}})
    loader = _loader(settings, dist.rank(), dist.world_size())
    images, _ = _set()
    pixels = Transform(images, settings.data, seed=0, training=False)(np.arange(SIZE))
    index = {image.tobytes(): sample for sample, image in enumerate(pixels)}
    assert len(index) == SIZE
    seen = np.zeros((2, SIZE))
    for step, batch in enumerate(loader.from_step(0, 2 * loader.steps_per_epoch)):
        for image in batch.data.asnumpy()[: batch.samples]:
            seen[step // loader.steps_per_epoch, index[image.tobytes()]] += 1
    assert (dist.allreduce_sum(seen, "test.seen") == 1).all()


def test_weights_and_losses_do_not_depend_on_ranks() -> None:
    """Uneven shards in every step: 17 = 8 + 9 = 5 + 6 + 6, and 103 leaves a last batch of 1."""
    assert SIZE % 17 == 1  # so that all ranks but one get nothing of it
    _agree(config.from_dict(SETTINGS))


def test_clipping_sees_the_gradient_of_the_global_batch() -> None:
    settings = config.from_dict(
        {**SETTINGS, "optimizer": {"lr": 0.5, "momentum": 0.0, "clip_norm": 0.01}}
    )
    loader, net = _loader(settings, dist.rank(), dist.world_size()), _net()
    prepare.prepare_net(net, settings, loader.shape, mx.cpu())
    trainer = make_trainer(net, settings.optimizer)
    before = [p.data().asnumpy() for p in net.collect_params().values()]
    (batch,) = loader.from_step(0, 1)
    train_step(net, trainer, batch, settings)
    after = [p.data().asnumpy() for p in net.collect_params().values()]
    moved = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(after, before)))
    np.testing.assert_allclose(moved, 0.5 * 0.01, rtol=1e-3)


def test_clipping_keeps_weights_alike_where_processors_add_up_differently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As BLAS's kernels for AVX2 and AVX-512 do, in the last bits."""
    settings = config.from_dict(
        {**SETTINGS, "optimizer": {"lr": 0.5, "momentum": 0.0, "clip_norm": 0.01}}
    )
    dot = np.vdot
    monkeypatch.setattr(np, "vdot", lambda a, b: dot(a, b) * (1 + 1e-6 * dist.rank()))
    weights, _ = _train(settings, dist.rank(), dist.world_size())
    bits = [array.tobytes().hex() for array in weights]
    assert dist.gather_objects(bits) == [bits] * dist.world_size()


def test_accumulation_does_not_change_the_step() -> None:
    optimizer = {**SETTINGS["optimizer"], "accumulate": 3}
    _agree(config.from_dict({**SETTINGS, "optimizer": optimizer}))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_mixed_samples_have_soft_labels_on_any_number_of_ranks(accumulate: int) -> None:
    data = {**SETTINGS["data"], "mixup": 0.4, "cutmix": 1.0, "trivial_augment": True}
    optimizer = {**SETTINGS["optimizer"], "accumulate": accumulate}
    _agree(config.from_dict({**SETTINGS, "data": data, "optimizer": optimizer}))


def test_a_factor_of_the_learning_rate_is_alike_on_all_ranks() -> None:
    optimizer = {**SETTINGS["optimizer"], "lr_mult": {"*weight": 0.5}}
    _agree(config.from_dict({**SETTINGS, "optimizer": optimizer}))


@needs_bfloat16
def test_ranks_agree_in_bfloat16_as_far_as_it_rounds() -> None:
    """A rank's gradient is rounded before it is added to the others'; all get the same weights."""
    settings = config.from_dict(
        {**SETTINGS, "train": {**SETTINGS["train"], "precision": "bfloat16"}}
    )
    weights, _ = _train(settings, dist.rank(), dist.world_size())
    for own in weights:
        assert all((other == own).all() for other in dist.gather_objects(own))
    _agree(settings, rtol=2e-2)


def test_fp16_on_the_wire_is_seen_and_stays_close() -> None:
    optimizer = {**SETTINGS["optimizer"], "fp16_allreduce": True}
    assert _agree(config.from_dict({**SETTINGS, "optimizer": optimizer}), rtol=5e-3) > 1e-5


class _OneWayOrAnother(gluon.Block):
    """A layer that all samples take, and one that only a rank of odd number uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Dense(4), nn.Dense(4)

    def forward(self, x: mx.nd.NDArray) -> mx.nd.NDArray:
        y = self.first(x)
        if mx.autograd.is_training() and dist.rank() % 2 == 0:
            return y
        return y + self.second(x)


def test_weights_stay_alike_where_ranks_use_different_layers() -> None:
    settings = config.from_dict(SETTINGS)
    loader, net = _loader(settings, dist.rank(), dist.world_size()), _OneWayOrAnother()
    prepare.prepare_net(net, settings, loader.shape, mx.cpu())
    trainer = make_trainer(net, settings.optimizer)
    for batch in loader.from_step(0, 3):
        train_step(net, trainer, batch, settings)
    for parameter in net.collect_params().values():
        own = parameter.data().asnumpy()
        others = dist.gather_objects(own)
        assert all((other == own).all() for other in others), parameter.name


def test_a_net_without_batch_norm_can_be_saved(tmp_path: Path) -> None:
    """Its ranks have no running statistics of their own, and MXNet saves no empty array."""
    settings, net = config.Config(), _net()
    prepare.prepare_net(net, settings, (1, 8, 8), mx.cpu())
    trainer = make_trainer(net, settings.optimizer)
    state = checkpoint.RunState(step=1, config=config.to_dict(settings))
    statistics = replica.gather_statistics(net, settings)
    path = checkpoint.write(tmp_path, checkpoint.snapshot(net, trainer, state, statistics))
    assert checkpoint.problem(path) is None
    assert checkpoint.restore(path, net, trainer)[1] is None


def test_weights_that_are_frozen_are_not_gathered() -> None:
    net = nn.HybridSequential()
    net.add(nn.Dense(100, in_units=50), nn.BatchNorm(in_channels=100))
    net[0].collect_params().setattr("grad_req", "null")
    net.initialize()
    statistics = replica.gather_statistics(net, config.Config(batch_norm="local"))
    assert statistics.shape == (dist.world_size(), 2 * 100)


@pytest.mark.parametrize("kind", ["local", "sync"])
def test_running_statistics_of_a_custom_layer_are_averaged(kind: str) -> None:
    """Or each rank would evaluate a model of its own, and rank 0's would be saved."""
    net, settings = nn.Dense(4, in_units=3), config.from_dict({**SETTINGS, "batch_norm": kind})
    net.seen = net.params.get("seen", shape=(1, 2), init="zeros", differentiable=False)
    net.initialize()
    own = np.array([[dist.rank(), 1.0]])
    net.seen.set_data(mx.nd.array(own))
    counts = np.diff([17 * rank // dist.world_size() for rank in range(dist.world_size() + 1)])
    mean = (counts * np.arange(dist.world_size())).sum() / 17
    with replica.as_one_model(net, settings):
        np.testing.assert_allclose(net.seen.data().asnumpy(), [[mean, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(net.seen.data().asnumpy(), own)
    gathered = replica.gather_statistics(net, settings)
    np.testing.assert_array_equal(gathered[:, 0], np.arange(dist.world_size()))


def test_an_optimizer_whose_noise_differs_between_ranks_is_refused() -> None:
    net = nn.Dense(4, in_units=3)
    net.initialize()
    with pytest.raises(ConfigError, match="the optimizer is SGLD, whose noise each rank"):
        make_trainer(net, config.Optimizer("sgld"))


@pytest.mark.parametrize("what", ["training images", "training labels", "test images"])
def test_ranks_with_sets_of_their_own_are_refused_on_every_rank(what: str) -> None:
    """One pixel or label that differs is enough."""
    images, labels = _set()
    sets = {"training images": images, "training labels": labels, "test images": images.copy()}

    def check() -> None:
        train = ArraySource(sets["training images"], sets["training labels"])
        whole = input_pipeline.Sets(train, None, ArraySource(sets["test images"], labels))
        agreement.check_sets(agreement.of_data(whole), whole.sizes)

    check()
    changed = sets[what].copy()
    changed.reshape(-1)[-1] = dist.rank()
    sets[what] = changed
    with pytest.raises(DataError, match=rf"have different {what}: .*on rank 0.*on rank 1"):
        check()


def test_ranks_with_other_losses_are_refused_on_every_rank() -> None:
    weight = float(dist.rank())
    digests = agreement.of_loss(gluon.loss.SoftmaxCrossEntropyLoss(weight=weight))
    with pytest.raises(DataError, match="have different loss"):
        agreement.check_sets(digests, {"training": 1})


@pytest.mark.parametrize("which", [0, 1])
def test_a_loss_of_one_rank_alone_is_refused_on_every_rank(which: int) -> None:
    own = gluon.loss.SoftmaxCrossEntropyLoss() if dist.rank() == which else None
    with pytest.raises(DataError, match="have different loss"):
        agreement.check_sets(agreement.of_loss(own), {"training": 1})


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda rank: nn.Dense(4 + rank, in_units=3), r"bias \(4,\) float32, trained on rank 0"),
        (lambda rank: nn.Dense(4, in_units=3, use_bias=rank == 0), "no more parameters|weight"),
        (lambda rank: nn.Dense(4, in_units=3, dtype=["float32", "float64"][rank % 2]), "float64"),
    ],
)
def test_ranks_with_other_nets_are_refused_naming_the_first_parameter(
    made: Callable[[int], gluon.Block], words: str
) -> None:
    if dist.world_size() == 3 and "float64" in words:
        words = "float32"  # rank 2's is like rank 0's, and rank 1's is named first
    net = made(dist.rank())
    net.initialize()
    with pytest.raises(ConfigError, match=f"the ranks have different nets: .*({words})"):
        agreement.check_net(net)


def test_ranks_that_train_other_layers_are_refused() -> None:
    net = nn.Dense(4, in_units=3)
    net.initialize()
    net.weight.grad_req = "write" if dist.rank() == 0 else "null"
    with pytest.raises(ConfigError, match=r"weight \(4, 3\) float32, trained on rank 0"):
        agreement.check_net(net)


def test_ranks_whose_weights_have_parted_are_told_apart() -> None:
    net = nn.HybridSequential()
    net.add(nn.Dense(3, in_units=2), nn.Dense(2, in_units=3))
    net.initialize(mx.init.One())
    assert agreement.parted(agreement.checksums(net)) is None
    last = dist.world_size() - 1
    if dist.rank() == last:
        net[1].bias.set_data(mx.nd.array([0, 1e-38]))
    where = agreement.parted(agreement.checksums(net))
    assert where == f"1.bias on rank {last} is not that of rank 0"


@pytest.mark.parametrize("batch_norm_kind", ["local", "sync"])
def test_layers_made_before_on_one_rank_change_nothing(batch_norm_kind: str) -> None:
    """Gluon's global names then differ between ranks, and so does their order: dense10, dense8."""
    settings = config.from_dict({**SETTINGS, "batch_norm": batch_norm_kind})

    def trained(more: int) -> np.ndarray:
        for _ in range(more):
            nn.Dense(1), nn.BatchNorm(), batch_norm.SyncBatchNorm()
        net = nn.HybridSequential()
        net.add(nn.Conv2D(4, 3), nn.BatchNorm(), nn.Flatten(), nn.Dense(4), nn.Dense(4))
        prepare.prepare_net(net, settings, (1, 8, 8), mx.cpu())
        agreement.check_net(net)
        trainer = make_trainer(net, settings.optimizer)
        batch_norm.connect(net)
        resume.restore(None, net, trainer)
        for batch in _loader(settings, dist.rank(), dist.world_size()).from_step(0, 3):
            train_step(net, trainer, batch, settings)
        assert agreement.parted(agreement.checksums(net)) is None
        mx.nd.waitall()
        return np.concatenate([p.data().asnumpy().ravel() for p in ordered_parameters(net)])

    alike = trained(0)
    np.testing.assert_array_equal(trained(9 * (dist.rank() == 0)), alike)


def test_evaluation_counts_each_sample_once() -> None:
    settings, net = config.from_dict(SETTINGS), _net()
    prepare.prepare_net(net, settings, (1, 8, 8), mx.cpu())

    def run(rank: int, world_size: int) -> EvalLoader:
        return EvalLoader(
            ArraySource(*_set()),
            settings.data,
            batch_size=7,
            rank=rank,
            world_size=world_size,
            place=on_device(mx.cpu()),
        )

    metrics = built_in(config.Evaluate(top_k=2), 4)
    spread = evaluate(net, run(dist.rank(), dist.world_size()), 4, metrics=metrics)
    assert spread.samples == SIZE
    # Every rank over the whole set: sums over ranks are then world_size times one process's.
    whole = evaluate(net, run(0, 1), 4, metrics=metrics)
    flipped = (
        evaluate(net, run(*of), 4, flip=True) for of in [(dist.rank(), dist.world_size()), (0, 1)]
    )
    assert next(flipped).loss == pytest.approx(next(flipped).loss, rel=1e-6) != whole.loss
    assert spread.accuracy < spread.metrics["top2_accuracy"] == whole.metrics["top2_accuracy"]
    np.testing.assert_array_equal(spread.confusion * dist.world_size(), whole.confusion)
    np.testing.assert_array_equal(spread.score_counts * dist.world_size(), whole.score_counts)
    np.testing.assert_allclose(spread.loss, whole.loss, rtol=1e-6)


def test_same_run_twice_is_the_same_to_the_last_bit() -> None:
    """On three ranks Horovod's fusion would otherwise change the order of summation."""
    settings = config.from_dict(SETTINGS)
    first, second = (_train(settings, dist.rank(), dist.world_size()) for _ in range(2))
    assert first[1] == second[1]
    for ours, theirs in zip(first[0], second[0]):
        np.testing.assert_array_equal(ours, theirs)


def _mapped_and_open() -> Tuple[int, int]:
    """Mappings of memory files, and open files, of this process."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum("/memfd:" in line for line in maps), len(os.listdir("/proc/self/fd"))


def _grow_by(found: List[Tuple[int, int]]) -> int:
    """By how many more than at first: what MXNet's engine is still to free may add one."""
    return max(max(now - first for now, first in zip(one, found[0])) for one in found)


@pytest.mark.one_node
def test_fit_called_many_times_leaks_no_mapping_and_no_file(tmp_path: Path) -> None:
    """Nor does a gradient that the user has kept break: its memory stays for as long as it does."""

    settings = config.from_dict(
        {
            "train": {"global_batch_size": 17, "max_steps": 2},
            "monitor": {"loggers": []},
            "batch_norm": "sync",
            "output": str(tmp_path),
        }
    )
    kept: List[mx.nd.NDArray] = []

    def keep(end: EpochEnd) -> None:
        kept.append(net[0].weight.grad()[:1])

    found = []
    for number in range(6):
        net = nn.HybridSequential()
        net.add(nn.Conv2D(4, 3), nn.BatchNorm(), nn.Flatten(), nn.Dense(4))
        keeping = keep if number == 2 else None
        fit(net, settings, resume="none", train=_set(), on_epoch_end=keeping)
        found.append(_mapped_and_open())
    del found[0]  # it counts what earlier tests have left, until the next run frees it
    assert not kept[0].asnumpy().any()  # of memory that was given back
    kept.clear()
    mx.nd.waitall()
    fit(net, settings, resume="none", train=_set())
    assert found[1] == (found[0][0] + 1, found[0][1] + 1), found  # for what is kept
    assert _grow_by(found[1:]) <= 1, found
    assert _grow_by([found[0], _mapped_and_open()]) <= 1, found


@pytest.mark.one_node
def test_runs_that_end_by_an_exception_of_a_hook_leak_no_mapping_and_no_file(
    tmp_path: Path,
) -> None:
    """As trials of a search that are given up."""

    def give_up(end: EpochEnd) -> None:
        raise KeyError("given up")

    settings = config.from_dict(
        {
            "train": {"global_batch_size": 17, "epochs": 1},
            "monitor": {"loggers": []},
            "output": str(tmp_path),
        }
    )
    found = []
    for _ in range(5):
        net = nn.HybridSequential()
        net.add(nn.Conv2D(4, 3), nn.BatchNorm(), nn.Flatten(), nn.Dense(4))
        with pytest.raises(KeyError):
            fit(net, settings, resume="none", train=_set(), on_epoch_end=give_up)
        found.append(_mapped_and_open())
    assert _grow_by(found[1:]) <= 1, found

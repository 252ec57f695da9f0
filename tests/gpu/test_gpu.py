"""Everything that runs on the device gives the same on a GPU as on the CPU.

The GPU's half is skipped where MXNet sees none, and has never been run; on a machine with one, or
better two, for what crosses ranks:

    make setup GPU=1 && .venv/bin/pip install -r requirements-dev.txt
    .venv/bin/python -m pytest tests/gpu

The CPU's half shows that the tests themselves are sound; other tests hold the CPU to the formulas.
"""

from __future__ import annotations

import os

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn

import launch
from trainer import checkpoint
from trainer.batch_norm import convert_sync_batch_norm, layers_of, running_statistics
from trainer.config import from_dict
from trainer.config.schema import Config
from trainer.data import input_pipeline, randomness
from trainer.data.sources.base import ArraySource
from trainer.dist.ranks import visible_gpus
from trainer.model import mixed_precision
from trainer.model.loss_scale import LossScale
from trainer.run.loop import fit
from trainer.step.optimizer import make_trainer
from trainer.step.step import train_step

TOLERANCE = 1e-3  # of the largest number: cuDNN and oneDNN sum in other orders
OF_HALF = 2e-2  # the same for layers that multiply in float16
rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (24, 28, 28), np.uint8)
LABELS = rng.integers(0, 10, 24)
SOURCE = ArraySource(IMAGES, LABELS)


def configured(**settings: object) -> Config:
    return from_dict({"train": {"global_batch_size": 8, "epochs": 1}, **settings})


def convolutional() -> nn.HybridSequential:
    """A small net without dropout, whose draws differ between devices."""
    net = nn.HybridSequential()
    for _ in range(2):
        net.add(nn.Conv2D(8, kernel_size=3, use_bias=False), nn.BatchNorm(), nn.Activation("relu"))
    net.add(nn.GlobalAvgPool2D(), nn.Dense(10))
    return net


def drawn(ctx: mx.Context) -> nn.HybridSequential:
    """The net with the same weights on every device."""
    net = convolutional()
    net.initialize(ctx=ctx)
    net(mx.nd.zeros((1, 1, 28, 28), ctx=ctx))
    draw = np.random.default_rng(1)
    for parameter in net.collect_params().values():
        if parameter.grad_req != "null":
            values = draw.normal(0.0, 0.2, parameter.shape) + parameter.name.endswith("gamma")
            parameter.set_data(mx.nd.array(values, ctx=ctx))
    return net


def weights(net: mx.gluon.Block) -> dict:
    return {k: p.data().asnumpy() for k, p in net._collect_params_with_prefix().items()}


def assert_alike(found: dict, expected: dict, tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    allowed = tolerance * max(np.abs(values).max() for values in expected.values())
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=allowed, err_msg=name)


def test_batches_are_where_the_net_is(ctx):
    config = configured(data={"pad_crop": 2, "flip": True})
    found = list(input_pipeline.train_loader(SOURCE, config, ctx).from_step(0, 3))
    expected = list(input_pipeline.train_loader(SOURCE, config, mx.cpu()).from_step(0, 3))
    assert [batch.data.context for batch in found] == [ctx] * 3
    for here, there in zip(found, expected):
        np.testing.assert_array_equal(here.data.asnumpy(), there.data.asnumpy())
        np.testing.assert_array_equal(here.label.asnumpy(), there.label.asnumpy())


def test_dropout_follows_the_seed(ctx):
    def dropped(seed: int) -> np.ndarray:
        mx.random.seed(seed)
        with randomness.seeded_dropout(), mx.autograd.train_mode():
            return nn.Dropout(0.5)(mx.nd.ones(1000, ctx=ctx)).asnumpy()

    np.testing.assert_array_equal(dropped(3), dropped(3))
    assert (dropped(3) != dropped(4)).any()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"clip_norm": 0.5, "accumulate": 2}, {"nesterov": True}], ids=str
)
def test_steps_make_the_weights_of_the_cpu(ctx, settings, half):
    """With ``half`` a GPU multiplies in float16, which CPUs cannot; they scale the loss alone."""
    config = configured(optimizer={"lr": 0.01, **settings})

    def trained(where: mx.Context) -> dict:
        net = drawn(where)
        net.hybridize(static_alloc=True)
        trainer = make_trainer(net, config.optimizer)
        scale = LossScale(where) if half else None
        precision = "float16" if half and where.device_type == "gpu" else "float32"
        with mixed_precision.computing_in(net, precision):
            for batch in input_pipeline.train_loader(SOURCE, config, where).from_step(0, 2):
                train_step(net, trainer, batch, config, want_norm=True, scale=scale)
        mx.nd.waitall()
        assert not half or scale.read().skipped_steps == 0
        return weights(net)

    assert_alike(trained(ctx), trained(mx.cpu()), OF_HALF if half else TOLERANCE)


@pytest.mark.parametrize("hybridize", [False, True])
def test_synced_batch_norm_is_plain_batch_norm_on_one_rank(ctx, hybridize):
    """As a rank that has peers would compute it: the operator is in use, the sum is its own."""

    def gradients(synced: bool) -> dict:
        net = drawn(ctx)
        if synced:
            convert_sync_batch_norm(net)
            for layer in layers_of(net):
                layer.rank_sum.collected = mx.nd.zeros(1, ctx=ctx, dtype="float64")
        if hybridize:
            net.hybridize(static_alloc=True)
        data = mx.nd.array(IMAGES[:, None] / 255.0, ctx=ctx)
        with mx.autograd.record():
            loss = net(data).square().sum()
        loss.backward()
        mx.nd.waitall()
        parameters = net._collect_params_with_prefix().items()
        return {k: p.grad().asnumpy() for k, p in parameters if p.grad_req != "null"}

    assert_alike(gradients(synced=True), gradients(synced=False))


def test_calibration_measures_what_the_cpu_does(ctx):
    def calibrated(where: mx.Context) -> dict:
        net = drawn(where)
        running_statistics.calibrate(
            net, [(mx.nd.array(IMAGES[:, None] / 255.0, ctx=where), len(IMAGES))]
        )
        return weights(net)

    assert_alike(calibrated(ctx), calibrated(mx.cpu()))


def test_a_run_on_the_device_is_saved_and_resumed(ctx, tmp_path):
    """Its checkpoint of half the way, taken up there or on the CPU, ends as the straight run."""

    def run(name: str, where: mx.Context = ctx, **train: int) -> dict:
        config = configured(
            device=where.device_type,
            output=str(tmp_path),
            name=name,
            optimizer={"lr": 0.01},
            train={"global_batch_size": 8, "epochs": 2, **train},
        )
        net = convolutional()
        result = fit(net, config, train=(IMAGES, LABELS), test=(IMAGES, LABELS))
        assert all(p.list_ctx() == [where] for p in net.collect_params().values())
        assert checkpoint.find_latest(result.folder / "checkpoints", pytest.fail) is not None
        return weights(net)

    straight = run("straight")
    for name, where in (("stopped", ctx), ("moved", mx.cpu())):
        run(name, max_steps=4)
        assert_alike(run(name, where), straight)


def test_two_ranks_make_the_weights_of_one_on_the_cpu(ctx, tmp_path):
    """What `make train` does: NCCL, buckets, the broadcast, synced norm, Nesterov's momentum."""
    ranks = 2 if ctx.device_type == "cpu" or visible_gpus() > 1 else 1

    def job(device: str, images: np.ndarray, labels: np.ndarray) -> dict:
        from trainer import fit
        from trainer.config import from_dict
        from trainer.model import resnet18

        net = resnet18(width=4)
        config = {
            "device": device,
            "output": f"{tmp_path}/{device}-{os.environ.get('HOROVOD_SIZE')}",
            "batch_norm": "sync",
            "optimizer": {"lr": 0.01, "nesterov": True},
            "train": {"global_batch_size": 7, "epochs": 1},
        }
        fit(net, from_dict(config), train=(images, labels), test=(images, labels))
        return {k: p.data().asnumpy() for k, p in net._collect_params_with_prefix().items()}

    found = launch.run(job, (ctx.device_type, IMAGES, LABELS), ranks=ranks)
    (expected,) = launch.run(job, ("cpu", IMAGES, LABELS), ranks=1)
    for own in found:
        assert_alike(own, expected, 10 * TOLERANCE)  # many more layers

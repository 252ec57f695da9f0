"""Dynamic loss scaling, beside NumPy: the scale, skipped steps, and training in float16."""

from __future__ import annotations

from typing import Any, Dict, List

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn

from tests import half
from trainer.config import from_dict
from trainer.data.loader import Batch
from trainer.errors import ConfigError
from trainer.model import loss_scale, mixed_precision, resnet18
from trainer.model.loss_scale import LossScale, all_finite
from trainer.mxnet_internals import optimizer_arrays
from trainer.step.gradients import zero_unused_gradients
from trainer.step.metrics import NonFiniteError, TrainMetrics
from trainer.step.optimizer import make_trainer
from trainer.step.step import train_step

GROWS_AFTER = 3
OPTIMIZERS = sorted(set(mx.optimizer.Optimizer.opt_registry) - {"test", "groupadagrad", "sgd"})


@pytest.fixture(autouse=True)
def _grows_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWS_AFTER", GROWS_AFTER)


class Numpy:
    """The rule in plain Python."""

    def __init__(self) -> None:
        self.scale, self.good, self.skipped = 2.0**16, 0, 0

    def after(self, finite: bool) -> List[float]:
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale, self.skipped = self.scale / 2, self.skipped + 1
        elif self.good == GROWS_AFTER:
            self.scale, self.good = min(2 * self.scale, 2.0**24), 0
        return [self.scale, self.good, self.skipped]


@pytest.mark.parametrize("overflows", [0.0, 0.1, 0.5])
def test_the_scale_follows_the_rule(overflows: float) -> None:
    """Also where it is read and made again in the middle, as by a checkpoint."""
    draw, rule = np.random.RandomState(1), Numpy()
    net = dense()
    trainer = make_trainer(net, from_dict({}).optimizer)
    scale = LossScale(mx.cpu())
    for step in range(60):
        finite = bool(draw.uniform() >= overflows)
        zero_unused_gradients(trainer)
        scale.update(trainer, mx.nd.array([finite]))
        assert list(scale.read()) == rule.after(finite)
        if step % 7 == 0:
            scale = LossScale(mx.cpu(), list(scale.read()))
    assert (rule.scale == 2.0**24) == (overflows == 0)


def dense() -> gluon.Block:
    net = nn.Dense(2, in_units=3)
    net.initialize(mx.init.Constant(0.25))
    return net


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [0, 201, 210])
def test_one_number_that_is_not_finite_is_found(bad: float, place: int) -> None:
    """Among more arrays than MXNet's kernel takes at once, of two dtypes."""
    arrays = [mx.nd.ones((2,), dtype="float64" if n > 205 else "float32") for n in range(211)]
    assert all_finite(arrays).asscalar() == 1
    arrays[place][1] = bad
    assert all_finite(arrays).asscalar() == 0


def batch(step: int, largest: float = 1.0) -> Batch:
    draw = np.random.RandomState(step)
    data = mx.nd.array(draw.uniform(-largest, largest, (6, 1, 6, 6)))
    return Batch(data, mx.nd.array(draw.randint(0, 4, 6)), 6, 6, (3, 3))


def arrays_of(net: gluon.Block, trainer: gluon.Trainer) -> Dict[str, np.ndarray]:
    mx.nd.waitall()
    found = {p.name: p.data().asnumpy() for p in net.collect_params().values()}
    for index in range(len(trainer._params)):
        for place, array in enumerate(optimizer_arrays(trainer, index)):
            found[f"{index}.{place}"] = array.asnumpy()
    return found


def small() -> nn.HybridSequential:
    mx.random.seed(0)
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3, in_channels=1, use_bias=False))  # Adamax divides by its gradient, 0
    net.add(nn.BatchNorm(in_channels=4), nn.Activation("tanh"))
    net.add(nn.Dense(4, in_units=64))
    net.initialize(mx.init.Normal(0.5))
    return net


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        {"momentum": 0.0},
        {"nesterov": True},
        {"clip_norm": 0.1, "accumulate": 2},
        *({"name": name} for name in OPTIMIZERS),
    ],
)
def test_a_skipped_step_changes_no_weight_and_no_array_of_the_optimizer(
    optimizer: Dict[str, Any], first: int
) -> None:
    """Nor does it where it is the first, which makes the optimizer's arrays."""
    config = from_dict({"optimizer": {"lr": 0.01, "weight_decay": 1e-3, **optimizer}})
    net = small()
    trainer, scale = make_trainer(net, config.optimizer), LossScale(mx.cpu())

    def infinite(part: str) -> None:
        if part == "ranks":
            net[0].weight.grad()[0, 0, 0, 0] = np.inf

    for step in range(first):
        train_step(net, trainer, batch(step), config, scale=scale)
    weights = [p for p in net.collect_params().values() if p.grad_req != "null"]
    before = [p.data().asnumpy().tobytes() for p in weights]
    arrays = arrays_of(net, trainer)
    train_step(net, trainer, batch(9), config, mark=infinite, scale=scale)
    assert [p.data().asnumpy().tobytes() for p in weights] == before
    after = arrays_of(net, trainer)
    still = [name for name in arrays if "running" not in name]
    assert all(after[name].tobytes() == arrays[name].tobytes() for name in still)
    assert scale.read() == (2.0**15, 0, 1)
    train_step(net, trainer, batch(9), config, scale=scale)
    assert [p.data().asnumpy().tobytes() for p in weights] != before


@pytest.mark.parametrize("optimizer", [{}, {"clip_norm": 0.1}, {"accumulate": 2}])
def test_a_power_of_two_changes_no_bit_of_float32(optimizer: Dict[str, Any]) -> None:
    config = from_dict({"optimizer": {"lr": 0.1, "nesterov": True, **optimizer}})
    found = []
    for scale in (None, LossScale(mx.cpu())):
        net = small()
        trainer = make_trainer(net, config.optimizer)
        for step in range(5):
            train_step(net, trainer, batch(step), config, want_norm=True, scale=scale)
        found.append([array.tobytes() for array in arrays_of(net, trainer).values()])
    assert found[0] == found[1]


def test_training_in_float16_is_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense layer whose loss is its output times the label; gradients overflow in some steps."""
    half.allow(monkeypatch)
    config = from_dict({"optimizer": {"lr": 0.5, "momentum": 0.5}})
    net = nn.Dense(1, use_bias=False, in_units=3)
    net.initialize(mx.init.Constant(1 / 3))
    trainer, scale = make_trainer(net, config.optimizer), LossScale(mx.cpu())
    rule = Numpy()
    weight, momentum = np.full(3, 1 / 3, np.float32), np.zeros(3, np.float32)
    with mixed_precision.computing_in(net, "float16"):
        for step in range(12):
            draw = np.random.RandomState(step)
            data = draw.normal(size=(4, 3)).astype(np.float32)
            label = (draw.uniform(1, 2, 4) * (9 if step in (2, 3) else 0.1)).astype(np.float32)
            given = Batch(mx.nd.array(data), mx.nd.array(label), 4, 4)
            result = train_step(
                net, trainer, given, config, loss_of=lambda y, target: y[:, 0] * target, scale=scale
            )
            with np.errstate(over="ignore", invalid="ignore"):
                scores = data.astype(np.float16).astype(np.float32) @ as_half(weight)
                start = as_half(label * np.float32(rule.scale / 4))
                gradient = as_half(start @ as_half(data)) / np.float32(rule.scale)
            assert result.loss_sum.asscalar() == pytest.approx(
                (as_half(scores) * label).sum(), rel=1e-5
            )
            finite = bool(np.isfinite(gradient).all())
            assert finite == (step not in (2, 3))
            if finite:
                momentum = np.float32(0.5) * momentum - np.float32(0.5) * gradient
                weight = weight + momentum
            assert list(scale.read()) == rule.after(finite)
            np.testing.assert_allclose(net.weight.data().asnumpy()[0], weight, rtol=1e-5)
    assert rule.skipped == 2


def as_half(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16).astype(np.float32)


def test_small_gradients_live_by_the_scale_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    half.allow(monkeypatch)
    config = from_dict({"optimizer": {"lr": 1.0, "momentum": 0.0}})
    moved = []
    for scale in (None, LossScale(mx.cpu())):
        net = nn.Dense(1, use_bias=False, in_units=1)
        net.initialize(mx.init.Zero())
        trainer = make_trainer(net, config.optimizer)
        given = Batch(mx.nd.ones((1, 1)), mx.nd.full((1,), 2.0**-30), 1, 1)
        with mixed_precision.computing_in(net, "float16"):
            loss = lambda y, target: y[:, 0] * target  # noqa: E731
            train_step(net, trainer, given, config, loss_of=loss, scale=scale)
        moved.append(net.weight.data().asscalar())
    assert moved == [0.0, -(2.0**-30)]


def test_gradients_that_no_scale_makes_finite_end_the_run() -> None:
    net = dense()
    trainer, scale = make_trainer(net, from_dict({}).optimizer), LossScale(mx.cpu(), (1.0, 0, 5))
    metrics = TrainMetrics(mx.cpu(), scale=scale)
    metrics.totals()
    assert metrics.loss_scale == (1.0, 0, 5)
    zero_unused_gradients(trainer)
    scale.update(trainer, mx.nd.array([0]))
    with pytest.raises(NonFiniteError, match="gradients were found not finite, loss scale or not"):
        metrics.totals()


def test_cpus_are_refused() -> None:
    """MXNet has no kernel for them, which would stop the first step."""
    net = dense()
    with pytest.raises(ConfigError, match=r"float16, which .* GPUs alone, not on cpu\(0\)"):
        mixed_precision.check(net, "float16", mx.cpu())
    found = pytest.raises(mx.MXNetError, match="float16 .*only supported by CuDNN")
    with mixed_precision.computing_in(net, "float16"), found:
        net(mx.nd.ones((1, 3))).wait_to_read()


def test_a_net_in_float16_is_so_in_its_products_alone() -> None:
    """By the types that MXNet infers for its graph; kernels are on GPUs alone."""
    net = resnet18()
    net.initialize()
    net(mx.nd.zeros((1, 1, 28, 28)))
    with mixed_precision.computing_in(net, "float16"):
        graph = net(mx.sym.var("data", shape=(1, 1, 28, 28), dtype="float32"))
    inside = graph.get_internals()
    _, types, _ = inside.infer_type(data="float32")
    nodes = dict(zip(inside.list_outputs(), types))
    _, weights, _ = graph.infer_type(data="float32")
    assert {np.dtype(kind).name for kind in weights} == {"float32"}
    products = [n for n in nodes if ("conv" in n or "dense" in n) and n.endswith("_fwd_output")]
    assert len(products) == 21
    assert {np.dtype(nodes[name]).name for name in products} == {"float16"}
    others = [n for n in nodes if "batchnorm" in n or "relu" in n or "pool" in n]
    assert {np.dtype(nodes[name]).name for name in others} == {"float32"}

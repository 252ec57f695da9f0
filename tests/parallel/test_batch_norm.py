"""Synced batch norm on several ranks against plain batch norm over the same samples in one process.

The reference is computed inside a rank, on the whole batch, without its peers. What depends on how
ranks are spread over hosts, the way of sums, is tried on all layouts, the rest on one of them. Two
variables of the environment make it long: ``STRESS_STEPS=300`` and ``FULL_WIDTH_STEPS=20``.
"""

from __future__ import annotations

import functools
import gc
import os
import pickle
import random
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn

from tests.processor import needs_bfloat16
from trainer import batch_norm, dist
from trainer.batch_norm import running_statistics
from trainer.batch_norm.rank_sum import RankSum
from trainer.model import mixed_precision, resnet18, resnet_block
from trainer.step.optimizer import gluon_trainer

RANKS = (2, 3)
HOSTS = ((1, 1), (2, 2), (1, 1, 1))
ONE_LAYOUT = (pytest.mark.ranks(3), pytest.mark.one_node)
STEPS = 3
SAMPLES = 24


def on_one_layout(test: Any) -> Any:
    """Run ``test`` on three ranks of one host alone."""
    for mark in ONE_LAYOUT:
        test = mark(test)
    return test


def shard(sizes: Sequence[int]) -> slice:
    """This rank's rows of the global batch, when rank r holds ``sizes[r]``."""
    start = sum(sizes[: dist.rank()])
    return slice(start, start + sizes[dist.rank()])


def equal() -> List[int]:
    return [SAMPLES // dist.world_size()] * dist.world_size()


def unequal() -> List[int]:
    return [SAMPLES - (dist.world_size() - 1), *[1] * (dist.world_size() - 1)]


def with_empty() -> List[int]:
    return [*[0] * (dist.world_size() - 1), SAMPLES]


def samples(shape: Tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).normal(1, 2, (SAMPLES, *shape))


def parameters(net: gluon.Block) -> Dict[str, np.ndarray]:
    return {k: p.data().asnumpy() for k, p in net._collect_params_with_prefix().items()}


def largest_difference(a: Dict[str, np.ndarray], b: Dict[str, np.ndarray]) -> float:
    """Of each array by its own scale, then over arrays; NaN where any number is."""
    assert a.keys() == b.keys() and a
    return float(np.max([np.abs(a[k] - b[k]).max() / max(1, np.abs(b[k]).max()) for k in a]))


def build(make: Any, data: np.ndarray, dtype: str) -> gluon.Block:
    mx.random.seed(7)
    net = make()
    net.initialize(mx.init.Xavier())
    net.cast(dtype)
    net(nd.array(data[:1], dtype=dtype))
    return net


def train(
    net: gluon.Block, data: np.ndarray, dtype: str, sizes: Optional[Sequence[int]], steps: int
) -> Dict[str, np.ndarray]:
    """SGD with momentum on squared outputs; the state after it and the losses.

    With ``sizes``, this rank's shard in step with its peers; without, all samples alone.
    """
    rows = data if sizes is None else data[shard(sizes)]
    empty = len(rows) == 0
    x = nd.array(1000 * data[:1] if empty else rows, dtype=dtype)
    alone = gluon.Trainer(net.collect_params(), "sgd", SGD, kvstore=None)
    trainer = alone if sizes is None else gluon_trainer(net.collect_params(), optimizer())
    weight = 0 if empty else 1 / len(data)
    # Cancels the trainer's average over ranks: MXNet would hold a third as float32.
    scale = 1 if sizes is None else 1 / dist.world_size()
    losses = []
    for _ in range(steps):
        if empty:
            with batch_norm.empty_batch():
                loss = forward_backward(net, x, weight)
        else:
            loss = forward_backward(net, x, weight)
        trainer.step(scale)
        losses.append(0 if empty else loss.sum().asscalar())
    total = np.array(losses, np.float64)
    if sizes is not None:
        total = dist.allreduce_sum(total, "losses")
    return {**parameters(net), "losses": total}


SGD = {"learning_rate": 1e-4, "momentum": 0.9, "wd": 1e-4}


def optimizer() -> mx.optimizer.Optimizer:
    return mx.optimizer.create("sgd", **SGD)


def forward_backward(net: gluon.Block, x: nd.NDArray, weight: float) -> nd.NDArray:
    with autograd.record():
        y = net(x)
        target = nd.arange(y.shape[1], dtype=y.dtype).reshape((1, -1)) / y.shape[1]
        loss = ((y.reshape((0, 0, -1)).mean(axis=2) - target) ** 2).mean(axis=1)
    loss.backward(nd.ones_like(loss) * weight)
    return loss


def narrow_seed_net(activation: str = "relu", pool: Any = nn.MaxPool2D) -> gluon.Block:
    """The seed's net, layer for layer, with a quarter of its channels: a sixteenth of the time."""
    net = nn.HybridSequential()
    net.add(
        nn.Conv2D(16, kernel_size=7, strides=2, padding=3),
        nn.BatchNorm(),
        nn.Activation(activation),
        pool(pool_size=3, strides=2, padding=1),
        resnet_block(16, 2, first_block=True),
        resnet_block(32, 2),
        resnet_block(64, 2),
        resnet_block(128, 2),
        nn.GlobalAvgPool2D(),
        nn.Dense(10),
    )
    return net


def smoothly(activation: Any) -> Any:
    return lambda x, act_type, **arguments: activation(x, act_type="softrelu", **arguments)


def smooth_seed_net() -> gluon.Block:
    return narrow_seed_net("softrelu", nn.AvgPool2D)


@functools.lru_cache(maxsize=None)
def seed_reference(
    make: Any, dtype: str, steps: int, order: Optional[int] = None
) -> Dict[str, np.ndarray]:
    """The seed's net with plain batch norm on all samples, in an order drawn from ``order``.

    Rank 0 trains it for all. All build it: names of blocks are counted in each process, and Gluon's
    trainer takes parameters in the order of their names.
    """
    data = samples((1, 14, 14), seed=1)
    net = build(make, data, dtype)
    if order is not None:
        data = data[np.random.RandomState(order).permutation(SAMPLES)]
    if dist.is_root():
        return from_root(train(net, data, dtype, None, steps))
    return from_root({**parameters(net), "losses": np.zeros(steps)})


def from_root(arrays: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """Rank 0's, of the same names and shapes."""
    given = {name: nd.array(array, dtype=array.dtype) for name, array in arrays.items()}
    return {name: dist.broadcast_array(array, name).asnumpy() for name, array in given.items()}


def seed_synced(
    make: Any, dtype: str, sizes: Sequence[int], hybridize: Dict[str, bool], steps: int
) -> Dict[str, np.ndarray]:
    data = samples((1, 14, 14), seed=1)
    net = batch_norm.convert_sync_batch_norm(build(make, data, dtype))
    if hybridize:
        net.hybridize(**hybridize)
    return train(net, data, dtype, sizes, steps)


FORMS: Dict[str, Dict[str, bool]] = {  # what hybridize is told, if it is called
    "imperative": {},
    "hybridized": {"active": True},
    "static": {"static_alloc": True, "static_shape": True},
}
# By what the environment says: see rank_sum.py.
OPERATORS = {"0": "Python", "1": "C++", "device": "Python, as on GPUs"}
SHARDS_AND_FORMS = [(unequal, "imperative"), (equal, "static"), (with_empty, "hybridized")]


@pytest.mark.parametrize(
    ("sizes", "form", "native"),
    [
        (with_empty, "hybridized", "1"),
        *(
            pytest.param(*case, marks=ONE_LAYOUT)
            for case in [
                *((*pair, "1") for pair in SHARDS_AND_FORMS[:2]),
                (unequal, "static", "0"),
                *((*pair, "device") for pair in SHARDS_AND_FORMS),
            ]
        ),
    ],
)
def test_seed_net_is_exact_in_float64(
    sizes: Any, form: str, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCH_NORM_NATIVE", native)
    reference = seed_reference(narrow_seed_net, "float64", STEPS)
    result = seed_synced(narrow_seed_net, "float64", sizes(), FORMS[form], STEPS)
    assert largest_difference(result, reference) < 1e-12


@on_one_layout
@pytest.mark.parametrize(("sizes", "form"), SHARDS_AND_FORMS)
def test_seed_net_in_float32_is_as_close_as_another_batch_order(sizes: Any, form: str) -> None:
    """Where a ReLU meets a number near zero, rounding parts runs by a jump: in orders, as here."""
    reference = seed_reference(narrow_seed_net, "float32", STEPS)
    others = [seed_reference(narrow_seed_net, "float32", STEPS, order) for order in range(2)]
    floor = max(largest_difference(other, reference) for other in others)
    assert 0 < floor < 0.1
    result = seed_synced(narrow_seed_net, "float32", sizes(), FORMS[form], STEPS)
    assert largest_difference(result, reference) < 3 * floor


@on_one_layout
@pytest.mark.parametrize("native", OPERATORS)
def test_seed_net_without_kinks_differs_by_rounding_alone(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ReLU and max pooling made smooth, float32 runs do not part by jumps."""
    monkeypatch.setenv("BATCH_NORM_NATIVE", native)
    for functions in (nd, mx.sym):
        monkeypatch.setattr(functions, "Activation", smoothly(functions.Activation))
    reference = seed_reference(smooth_seed_net, "float32", STEPS)
    floor = largest_difference(seed_reference(smooth_seed_net, "float32", STEPS, 0), reference)
    assert 0 < floor < 1e-5
    result = seed_synced(smooth_seed_net, "float32", unequal(), FORMS["static"], STEPS)
    assert largest_difference(result, reference) < 3 * floor


@pytest.mark.parametrize("native", OPERATORS)
def test_all_ranks_and_runs_have_the_same_bits(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCH_NORM_NATIVE", native)
    data, results = samples((4, 5)), []
    reference = train(build(small(), data, "float32"), data, "float32", None, 3)
    for _ in range(2):
        net = batch_norm.convert_sync_batch_norm(build(small(), data, "float32"))
        trained = train(net, data, "float32", unequal(), 3)
        assert largest_difference(trained, reference) < 1e-5
        results += dist.gather_objects({name: trained[name].tobytes().hex() for name in trained})
    assert all(result == results[0] for result in results)


@on_one_layout
def test_seed_net_of_full_width_is_exact_in_float64() -> None:
    steps = int(os.environ.get("FULL_WIDTH_STEPS", "1"))
    result = seed_synced(resnet18, "float64", unequal(), {"static_alloc": True}, steps)
    assert largest_difference(result, seed_reference(resnet18, "float64", steps)) < 1e-12


def small(**arguments: Any) -> Any:
    """A net around one batch norm layer, over C = 4 channels wherever they are."""

    def make() -> gluon.Block:
        net = nn.HybridSequential()
        net.add(nn.Dense(4, flatten=False), nn.BatchNorm(**arguments), nn.Activation("tanh"))
        return net

    return make


ARGUMENTS: List[Tuple[Tuple[int, ...], Dict[str, Any]]] = [
    ((5,), {}),
    ((3, 5), {"axis": -1}),
    ((4, 5), {}),
    ((2, 3, 5), {"axis": 3, "momentum": 0.5, "epsilon": 1e-3}),
    ((5,), {"scale": False}),
    ((5,), {"center": False}),
    ((5,), {"use_global_stats": True}),
]


@on_one_layout
@pytest.mark.parametrize("case", range(len(ARGUMENTS)))
def test_every_argument_means_what_it_means_on_one_rank(
    case: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each operator; over the cases, in every form, and on shards of all kinds."""
    shape, arguments = ARGUMENTS[case]
    data = samples(shape)
    reference = train(build(small(**arguments), data, "float64"), data, "float64", None, 3)
    for number, native in enumerate(OPERATORS):
        form = list(FORMS)[(case + number) % 3]
        sizes = (equal, unequal, with_empty)[(case // 3 + number) % 3]
        monkeypatch.setenv("BATCH_NORM_NATIVE", native)
        net = build(small(**arguments), data, "float64")
        batch_norm.convert_sync_batch_norm(net)
        batch_norm.convert_sync_batch_norm(net)  # drops what the first has not used
        if FORMS[form]:
            net.hybridize(**FORMS[form])
        result = train(net, data, "float64", sizes(), 3)
        assert largest_difference(result, reference) < 1e-12, (OPERATORS[native], form, sizes)


def test_layers_meet_by_first_use_whatever_a_rank_has_made_before() -> None:
    _ = [batch_norm.SyncBatchNorm(in_channels=2) for _ in range(3 * (dist.rank() == 0))]
    first, second = (batch_norm.SyncBatchNorm(in_channels=c) for c in (2, 3))
    for layer in (second, first):
        layer.initialize()
        channels = layer.running_mean.shape[0]
        with autograd.record():
            y = layer(nd.full((1, channels), dist.rank()))
        y.backward()
        own = dist.rank() - (dist.world_size() - 1) / 2
        assert np.sign(y.asnumpy()).tolist() == [[np.sign(own)] * channels]


@pytest.mark.parametrize("native", OPERATORS)
@on_one_layout
def test_ranks_whose_layers_differ_are_told(
    native: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATCH_NORM_NATIVE", native)
    layer = batch_norm.SyncBatchNorm(in_channels=2 + dist.is_root())
    layer.initialize()
    with pytest.raises(mx.MXNetError), autograd.record():
        layer(nd.ones((1, 2 + dist.is_root()))).wait_to_read()
    assert f"this one has {2 + dist.is_root()} channels" in "".join(capfd.readouterr())


@on_one_layout
@pytest.mark.parametrize("native", OPERATORS)
def test_running_statistics_read_right_after_backward_are_the_new_ones(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the moving averages of train.ema read them: MXNet's engine knows that they are written."""
    monkeypatch.setenv("BATCH_NORM_NATIVE", native)
    net = nn.HybridSequential()
    net.add(nn.Conv2D(16, kernel_size=3, in_channels=3), batch_norm.SyncBatchNorm(in_channels=16))
    net.initialize()
    net.hybridize(static_alloc=True)
    for _ in range(5):
        with autograd.record():
            loss = (net(nd.random.normal(5, 1, shape=(8, 3, 32, 32))) ** 2).sum()
        loss.backward()
        read = net[1].running_mean.data().asnumpy()
        nd.waitall()
        np.testing.assert_array_equal(read, net[1].running_mean.data().asnumpy())


@on_one_layout
def test_an_unpickled_layer_is_synced() -> None:
    layer = batch_norm.convert_sync_batch_norm(nn.BatchNorm(in_channels=1, prefix="pickled_"))
    layer.initialize()
    pickled = pickle.dumps(layer)
    del layer
    gc.collect()
    with autograd.train_mode():
        out = pickle.loads(pickled)(nd.full((1, 1), dist.rank())).asscalar()
    ranks = np.arange(dist.world_size())
    assert out == pytest.approx((dist.rank() - ranks.mean()) / ranks.std(), rel=1e-3)


@on_one_layout
@needs_bfloat16
@pytest.mark.parametrize(("form", "native"), [("imperative", "0"), ("static", "1")])
def test_statistics_are_float32_where_products_are_bfloat16(
    form: str, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a step; bfloat16 statistics would differ by 1e-3."""
    monkeypatch.setenv("BATCH_NORM_NATIVE", native)
    data, results = samples((1, 14, 14), seed=1), []
    for sizes in (None, unequal()):
        net = build(smooth_seed_net, data, "float32")
        if sizes is not None:
            batch_norm.convert_sync_batch_norm(net)
        if FORMS[form]:
            net.hybridize(**FORMS[form])
        with mixed_precision.computing_in(net, "bfloat16"):
            trained = train(net, data, "float32", sizes, 1)
        results.append({name: trained[name] for name in trained if "running" in name})
    assert largest_difference(*results) < 2e-6


def test_ranks_may_differ_in_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other rank has the one in Python, the others the one in C++."""
    data = samples((4, 5))
    reference = train(build(small(), data, "float64"), data, "float64", None, 3)
    monkeypatch.setenv("BATCH_NORM_NATIVE", str(dist.rank() % 2))
    net = batch_norm.convert_sync_batch_norm(build(small(), data, "float64"))
    assert largest_difference(train(net, data, "float64", unequal(), 3), reference) < 1e-12


@on_one_layout
def test_a_net_may_be_dropped_while_its_operators_run() -> None:
    """Its last user waits for the result; on the second rank the sum begins much later."""
    data = samples((4, 5))
    x, reference = nd.array(data[shard(equal())]), nd.array(data)
    for _ in range(3):
        time.sleep(0.1 * dist.rank())
        layer = batch_norm.SyncBatchNorm(in_channels=4)
        layer.initialize()
        with autograd.train_mode():
            y = layer(x)
            running = nd.zeros(4), nd.ones(4)
            expected = nd.BatchNorm(reference, nd.ones(4), nd.zeros(4), *running, eps=1e-5)
        del layer
        gc.collect()
        rows = expected.asnumpy()[shard(equal())]
        np.testing.assert_allclose(y.asnumpy(), rows, atol=1e-5)


@on_one_layout
def test_float16_data_with_float32_statistics() -> None:
    data = samples((4, 5)).astype(np.float16)
    plain, synced = nn.BatchNorm(in_channels=4), batch_norm.SyncBatchNorm(in_channels=4)
    results = []
    for layer, rows in ((plain, slice(None)), (synced, shard(unequal()))):
        layer.initialize()
        layer.cast("float16")
        with autograd.record():
            y = layer(nd.array(data[rows], dtype="float16"))
        y.backward()
        results.append((y, layer.running_mean.data(), layer.running_var.data()))
    (y, mean, variance), (own_y, own_mean, own_variance) = results
    assert own_y.dtype == np.float16 and own_mean.dtype == np.float32
    np.testing.assert_allclose(own_y.asnumpy(), y.asnumpy()[shard(unequal())], atol=4e-3)
    # MXNet's kernel rounds differences to float16 before it squares them.
    np.testing.assert_allclose(own_mean.asnumpy(), mean.asnumpy(), rtol=1e-3)
    np.testing.assert_allclose(own_variance.asnumpy(), variance.asnumpy(), rtol=1e-3)


def test_the_concatenated_batch_is_normalized_as_the_paper_says() -> None:
    """Ioffe and Szegedy, "Batch normalization", ICML 2015; the gradient by its chain rule."""
    data, rows = samples((4, 5, 5)), shard(unequal())
    layer = batch_norm.SyncBatchNorm(in_channels=4)
    layer.initialize()
    layer.cast("float64")
    x = nd.array(data[rows], dtype="float64")
    x.attach_grad()
    with autograd.record():
        y = layer(x)
    y.backward(y**2)

    def mean(array: np.ndarray) -> np.ndarray:
        return array.mean(axis=(0, 2, 3), keepdims=True)

    variance = mean((data - mean(data)) ** 2)
    deviation = np.sqrt(variance + 1e-5)
    expected = (data - mean(data)) / deviation
    given = expected**2
    back = (given - mean(given) - expected * mean(given * expected)) / deviation
    np.testing.assert_allclose(y.asnumpy(), expected[rows], atol=1e-12)
    np.testing.assert_allclose(x.grad.asnumpy(), back[rows], atol=1e-12)
    # MXNet holds the momentum as float32.
    moving = 0.1 * mean(data).ravel(), 0.9 + 0.1 * variance.ravel()
    np.testing.assert_allclose(layer.running_mean.data().asnumpy(), moving[0], rtol=1e-6)
    np.testing.assert_allclose(layer.running_var.data().asnumpy(), moving[1], rtol=1e-6)


class Delay(mx.operator.CustomOp):
    """Passes its input on after a random time that differs between ranks, both ways."""

    random = random.Random(os.environ.get("HOROVOD_RANK"))

    def forward(self, is_train: bool, req: Any, in_data: Any, out_data: Any, aux: Any) -> None:
        time.sleep(self.random.choice([0, 0, 0.0005, 0.002]))
        self.assign(out_data[0], req[0], in_data[0])

    def backward(
        self, req: Any, out_grad: Any, in_data: Any, out_data: Any, in_grad: Any, aux: Any
    ) -> None:
        self.forward(True, req, out_grad, in_grad, aux)


@mx.operator.register("delay")
class DelayProp(mx.operator.CustomOpProp):
    def create_operator(self, ctx: Any, in_shapes: Any, in_dtypes: Any) -> Delay:
        return Delay()


def delayed(F: Any, x: Any) -> Any:
    return F.Custom(x, op_type="delay")


def undelayed(F: Any, x: Any) -> Any:
    return F.identity(x)


class Branches(nn.HybridBlock):
    """Parallel branches that the engine may run in any order, and a layer used twice."""

    def __init__(self, between: Any, **kwargs: Any):
        super().__init__(**kwargs)
        self._between = between
        with self.name_scope():
            self.branches = nn.HybridSequential()
            for _ in range(8):
                branch = nn.HybridSequential()
                branch.add(nn.Dense(4), nn.HybridLambda(between), nn.BatchNorm())
                self.branches.add(branch)
            self.twice = nn.BatchNorm()
            self.last = nn.Dense(4)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        first = (self.branches[0], self.branches[1])
        parts = [self.twice(self._between(F, branch(x))) for branch in first]
        parts += [branch(x) for branch in self.branches]
        return self.last(F.add_n(*parts))


def two_nets(data: np.ndarray, between: Any) -> List[gluon.Block]:
    return [build(functools.partial(Branches, between), data, "float64") for _ in range(2)]


def train_both(
    nets: List[gluon.Block], data: np.ndarray, steps: int, make_trainer: Any, scale: float
) -> List[Dict[str, np.ndarray]]:
    """Two nets in flight at once, one called twice before backward, and one within a recording."""
    both = gluon.ParameterDict()
    for net in nets:
        both.update(net.collect_params())
    trainer, x = make_trainer(both), nd.array(data, dtype="float64")
    for _ in range(steps):
        with autograd.record():
            loss = (nets[0](x) - nets[1](2 * x)) ** 2
            with autograd.pause(), autograd.record():
                nets[0](5 * x)  # recorded within, and never differentiated
            loss = loss + nets[0](3 * x) ** 2  # the same net again, before any backward
        loss.backward()
        trainer.step(scale)
        loss.wait_to_read()  # or the program is many steps ahead of the engine: gigabytes
    return [parameters(net) for net in nets]


def slow_sgd() -> mx.optimizer.Optimizer:
    return mx.optimizer.create("sgd", learning_rate=1e-6)


@functools.lru_cache(maxsize=None)
def reference_of_both(steps: int) -> List[Dict[str, np.ndarray]]:
    """With plain batch norm on all samples, without delays, by rank 0; see seed_reference."""
    data, alone = (
        samples((5,)),
        functools.partial(gluon.Trainer, optimizer=slow_sgd(), kvstore=None),
    )
    nets = two_nets(data, undelayed)
    trained = train_both(nets, data, steps, alone, 1) if dist.is_root() else None
    return dist.broadcast_object(trained)


@pytest.mark.parametrize(
    ("form", "native", "through"),
    [
        ("static", "1", "shared memory"),
        pytest.param("imperative", "1", "shared memory", marks=ONE_LAYOUT),
        pytest.param("hybridized", "0", "shared memory", marks=ONE_LAYOUT),
        pytest.param("static", "1", "horovod", marks=ONE_LAYOUT),
        pytest.param("static", "device", "horovod", marks=ONE_LAYOUT),
    ],
)
def test_engine_may_take_layers_in_any_order_and_ends_exact(
    form: str, native: str, through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sum is delayed by a random time that differs between ranks."""
    monkeypatch.setenv("BATCH_NORM_NATIVE", native)
    if through == "horovod":
        monkeypatch.setattr(RankSum, "_share", lambda self, *_: None)
    data, steps = samples((5,)), int(os.environ.get("STRESS_STEPS", "2"))
    nets = [batch_norm.convert_sync_batch_norm(net) for net in two_nets(data, delayed)]
    if FORMS[form]:
        for net in nets:
            net.hybridize(**FORMS[form])
    trainer = functools.partial(gluon_trainer, optimizer=slow_sgd())
    results = train_both(nets, data[shard(unequal())], steps, trainer, 1 / dist.world_size())
    mx.nd.waitall()
    for result, reference in zip(results, reference_of_both(steps)):
        assert largest_difference(result, reference) < 1e-11


def two_layers(momentum: float = 0.9) -> Any:
    def make() -> gluon.Block:
        net = nn.HybridSequential()
        for _ in range(2):
            net.add(nn.Dense(4), nn.BatchNorm(momentum=momentum), nn.Activation("tanh"))
        return net

    return make


def move_statistics(net: gluon.Block, data: np.ndarray, steps: int) -> None:
    """Training steps that leave the weights alone."""
    for _ in range(steps):
        forward_backward(net, nd.array(data, dtype="float64"), 1.0)
    mx.nd.waitall()


@on_one_layout
def test_ranks_that_see_other_classes_merge_and_calibrate_into_one_model() -> None:
    """Each rank sees one end of the data; all evaluate all of it."""
    data = np.sort(samples((5,)), axis=0)
    own = data[shard(equal())]
    twin, net = (build(two_layers(), data, "float64") for _ in range(2))
    move_statistics(twin, data, 80)
    move_statistics(net, own, 80)

    def error() -> float:
        x = nd.array(data, dtype="float64")
        return float(abs(net(x) - twin(x)).mean().asscalar())

    drifted = error()
    running_statistics.merge(net, len(own))
    first, theirs = net[1], twin[1]
    mean, variance = theirs.running_mean.data(), theirs.running_var.data()
    np.testing.assert_allclose(first.running_mean.data().asnumpy(), mean.asnumpy(), rtol=1e-9)
    np.testing.assert_allclose(first.running_var.data().asnumpy(), variance.asnumpy(), rtol=0.05)
    merged = error()
    assert merged < drifted / 2

    running_statistics.calibrate(net, [(nd.array(own, dtype="float64"), len(own))])
    assert error() < merged / 20  # what is left: the twin's running average is 0.9^80 off


@on_one_layout
@pytest.mark.parametrize("synced", [False, True])
def test_calibrated_statistics_are_those_of_one_process(synced: bool) -> None:
    """Two global batches, the second with nothing for most ranks."""
    data = samples((5,)), samples((5,), seed=1)
    # With momentum 0 a plain layer's running statistics are its last batch's.
    expected = []
    for batch in data:
        plain = build(two_layers(momentum=0), batch, "float64")
        move_statistics(plain, batch, 1)
        expected.append(parameters(plain))
    net = build(two_layers(), data[0], "float64")
    if synced:
        batch_norm.convert_sync_batch_norm(net).hybridize(static_alloc=True)
    batches = []
    for batch, sizes in zip(data, (unequal(), with_empty())):
        rows = batch[shard(sizes)]
        stand_in = 1000 * batch[:1]
        batches.append((nd.array(rows if len(rows) else stand_in, dtype="float64"), len(rows)))
    running_statistics.calibrate(net, batches)
    assert isinstance(net[1], batch_norm.SyncBatchNorm) == synced
    for layer, index in ((net[1], "1."), (net[4], "4.")):
        mean = [e[index + "running_mean"] for e in expected]
        square = [e[index + "running_var"] + e[index + "running_mean"] ** 2 for e in expected]
        whole_mean, whole_square = sum(mean) / 2, sum(square) / 2
        np.testing.assert_allclose(layer.running_mean.data().asnumpy(), whole_mean, rtol=1e-12)
        variance = layer.running_var.data().asnumpy()
        np.testing.assert_allclose(variance, whole_square - whole_mean**2, rtol=1e-11)

"""One step: the gradient of the global mean loss, with any number of micro-batches."""

from __future__ import annotations

import contextlib
import dataclasses
import re

import mxnet as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mxnet import autograd, gluon
from mxnet.gluon import Block, nn, rnn

from trainer import batch_norm
from trainer.batch_norm.rank_sum import RankSum, registry
from trainer.config import Config, Optimizer, Train
from trainer.data.augment.mixing import Mixed
from trainer.data.loader import Batch
from trainer.errors import ConfigError
from trainer.mxnet_internals import kernel_arguments
from trainer.step import gradients
from trainer.step.loss import cross_entropy
from trainer.step.optimizer import make_trainer
from trainer.step.step import eval_step, forward, train_step
from trainer.step.timing import PARTS

RANDOM = np.random.RandomState(0)
DATA = RANDOM.uniform(-1, 1, (7, 1, 5, 5)).astype(np.float32)
LABEL = RANDOM.randint(0, 4, 7).astype(np.float32)


def make_net(norm: bool = False, hybridize: bool = False) -> nn.HybridSequential:
    mx.random.seed(2)
    net = nn.HybridSequential()
    net.add(nn.Conv2D(3, 3, in_channels=1), nn.Activation("tanh"))
    if norm:
        net.add(nn.BatchNorm(in_channels=3))
    net.add(nn.Dense(4, in_units=27))
    net.initialize(mx.init.Uniform(0.5))
    if hybridize:
        net.hybridize(static_alloc=True)
    return net


def batch_of(samples: int, global_samples: int, parts: int = 1) -> Batch:
    rows = max(samples, 1)
    sizes = tuple(len(part) for part in np.array_split(np.arange(samples), parts))
    data, label = mx.nd.array(DATA[:rows]), mx.nd.array(LABEL[:rows])
    return Batch(data, label, samples, global_samples, sizes)


def settings(accumulate: int = 1, smoothing: float = 0.0, **optimizer) -> Config:
    optimizer = {"lr": 1.0, "momentum": 0.0, **optimizer}
    return Config(
        optimizer=Optimizer(accumulate=accumulate, **optimizer),
        train=Train(label_smoothing=smoothing),
    )


def values(net: Block) -> dict:
    return {n: p.data().asnumpy() for n, p in net._collect_params_with_prefix().items()}


def gradient_of_a_step(net: Block, batch: Batch, config: Config):
    """What the step subtracts from each weight at learning rate 1, and the step's result."""
    before = values(net)
    result = train_step(net, make_trainer(net, config.optimizer), batch, config, want_norm=True)
    after = values(net)
    return {name: before[name] - after[name] for name in before}, result


def reference_gradient(net: Block, rows: int, divide_by: int, smoothing: float = 0.0) -> dict:
    """Sample by sample, in NumPy's float64 sums."""
    total = {}
    parameters = net._collect_params_with_prefix()
    for row in range(rows):
        with autograd.record():
            logits = net(mx.nd.array(DATA[row : row + 1]))
            log_probability = mx.nd.log_softmax(logits)
            target = np.full((1, 4), smoothing / 4, np.float32)
            target[0, int(LABEL[row])] += 1 - smoothing
            loss = -(log_probability * mx.nd.array(target)).sum()
        loss.backward()
        for name, parameter in parameters.items():
            if parameter.grad_req != "null":
                gradient = parameter.grad().asnumpy().astype(np.float64)
                total[name] = total.get(name, 0) + gradient / divide_by
    return total


# ---------------------------------------------------------------- the loss


@given(
    logits=st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=1, max_size=4),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 99),
)
def test_cross_entropy_is_the_formula(logits, smoothing, seed):
    x = np.array(logits, np.float64)
    label = np.random.RandomState(seed).randint(0, 3, len(x))
    log_probability = x - x.max(1, keepdims=True)
    log_probability -= np.log(np.exp(log_probability).sum(1, keepdims=True))
    target = (1 - smoothing) * np.eye(3)[label] + smoothing / 3
    expected = -(target * log_probability).sum(1)
    loss = cross_entropy(mx.nd.array(x), mx.nd.array(label), smoothing)
    assert loss.shape == (len(x),)
    np.testing.assert_allclose(loss.asnumpy(), expected, rtol=1e-5, atol=1e-5)


def test_cross_entropy_of_huge_logits_is_finite():
    loss = cross_entropy(mx.nd.array([[1e4, -1e4]]), mx.nd.array([1]), 0.1).asnumpy()
    assert np.isfinite(loss).all()


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradient_is_that_of_the_mean_loss(hybridize, smoothing):
    net = make_net(hybridize=hybridize)
    expected = reference_gradient(net, 7, 7, smoothing)
    gradient, result = gradient_of_a_step(net, batch_of(7, 7), settings(smoothing=smoothing))
    for name, value in expected.items():
        np.testing.assert_allclose(gradient[name], value, rtol=1e-4, atol=1e-6)
    norm = np.sqrt(sum((value**2).sum() for value in expected.values()))
    assert result.gradient_norm.asscalar() == pytest.approx(norm, rel=1e-4)


def test_gradient_of_a_share_is_divided_by_the_global_batch():
    """A rank with 3 of 7 samples: what it adds is its sum over 7, not its mean."""
    net = make_net()
    expected = reference_gradient(net, 3, 7)
    gradient, _ = gradient_of_a_step(net, batch_of(3, 7), settings())
    for name, value in expected.items():
        np.testing.assert_allclose(gradient[name], value, rtol=1e-4, atol=1e-6)


def test_result_sums_loss_and_hits_of_the_rank():
    net = make_net()
    logits = net(mx.nd.array(DATA[:5]))
    loss = cross_entropy(logits, mx.nd.array(LABEL[:5])).asnumpy()
    hits = (logits.asnumpy().argmax(1) == LABEL[:5]).sum()
    _, result = gradient_of_a_step(net, batch_of(5, 7), settings())
    assert result.loss_sum.shape == result.correct.shape == (1,)
    assert result.loss_sum.asscalar() == pytest.approx(loss.sum(), rel=1e-5)
    assert result.correct.asscalar() == hits


@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 9])
def test_micro_batches_make_the_same_step(parts, hybridize):
    """7 samples in uneven parts; in 9, two of which are empty."""
    whole, expected = gradient_of_a_step(make_net(), batch_of(7, 7), settings())
    net = make_net(hybridize=hybridize)
    gradient, result = gradient_of_a_step(net, batch_of(7, 7, parts), settings(accumulate=parts))
    for name, value in whole.items():
        np.testing.assert_allclose(gradient[name], value, rtol=1e-4, atol=1e-6)
    assert result.loss_sum.asscalar() == pytest.approx(expected.loss_sum.asscalar(), rel=1e-5)
    assert result.correct.asscalar() == expected.correct.asscalar()
    assert result.gradient_norm.asscalar() == pytest.approx(
        expected.gradient_norm.asscalar(), rel=1e-4
    )


def test_gradients_of_one_step_do_not_reach_into_the_next():
    net, config = make_net(), settings(accumulate=2, lr=1e-30)
    trainer = make_trainer(net, config.optimizer)
    norms = [
        train_step(net, trainer, batch_of(7, 7, 2), config, want_norm=True).gradient_norm.asscalar()
        for _ in range(3)
    ]
    assert norms[0] == norms[1] == norms[2] > 0


def test_gradients_of_one_step_do_not_reach_into_a_run_after_one_that_adds_up():
    """Nor into one of a net whose user had its gradients add up."""
    net, config = make_net(), settings(lr=1e-30)
    make_trainer(net, settings(accumulate=2).optimizer)
    trainer = make_trainer(net, config.optimizer)
    first, second = (
        train_step(net, trainer, batch_of(7, 7), config, want_norm=True).gradient_norm.asscalar()
        for _ in range(2)
    )
    assert first == second > 0


@pytest.mark.parametrize("by_kernels", [False, True])
def test_parameters_of_several_precisions_are_clipped_as_one(by_kernels, monkeypatch):
    """As of a net that is cast to float16, whose batch norm Gluon leaves in float32."""
    if by_kernels:
        monkeypatch.setattr(gradients, "_on_host", lambda arrays: False)  # as on GPUs
    net = nn.Dense(4, in_units=25)
    net.bias.cast("float64")

    class Mixed(Block):
        def __init__(self):
            super().__init__()
            self.dense = net

        def forward(self, x):
            weight, bias = net.weight.data(), net.bias.data().astype("float32")
            return mx.nd.FullyConnected(x, weight, bias, num_hidden=4)

    mixed = Mixed()
    mixed.initialize()
    config = settings(clip_norm=0.01)
    trainer = make_trainer(mixed, config.optimizer)
    result = train_step(mixed, trainer, batch_of(7, 7), config)
    clipped = [p.grad().asnumpy().astype(np.float64) for p in (net.weight, net.bias)]
    assert result.gradient_norm.asscalar() > 0.01
    assert np.sqrt(sum((c**2).sum() for c in clipped)) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clipping_on_cpus_is_that_of_mxnets_kernels(limit, monkeypatch):
    found = []
    for by_kernels in (False, True):
        if by_kernels:
            monkeypatch.setattr(gradients, "_on_host", lambda arrays: False)
        net, config = make_net(), settings(clip_norm=limit)
        trainer = make_trainer(net, config.optimizer)
        norm = train_step(net, trainer, batch_of(7, 7), config).gradient_norm.asscalar()
        found.append([norm, *(p.grad().asnumpy() for p in net.collect_params().values())])
    assert found[0][0] > 1e-2
    for host, kernels in zip(*found):
        np.testing.assert_allclose(host, kernels, rtol=1e-5, atol=1e-12)
    assert np.linalg.norm(np.concatenate([g.ravel() for g in found[0][1:]])) == pytest.approx(
        min(limit, found[0][0]), rel=1e-4
    )


def test_norm_is_left_out_unless_asked_for():
    net, config = make_net(), settings()
    trainer = make_trainer(net, config.optimizer)
    assert train_step(net, trainer, batch_of(7, 7), config).gradient_norm is None


# ---------------------------------------------------------------- a rank without samples


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("hybridize", [False, True])
def test_stand_in_of_an_empty_rank_counts_for_nothing(parts, hybridize):
    net = make_net(norm=True, hybridize=hybridize)
    before = values(net)
    gradient, result = gradient_of_a_step(net, batch_of(0, 4, parts), settings(accumulate=parts))
    for name, value in gradient.items():
        assert (value == 0).all(), name
    assert result.loss_sum.asscalar() == result.correct.asscalar() == 0
    assert result.gradient_norm.asscalar() == 0
    after = values(net)
    assert "2.running_mean" in after
    assert all((after[name] == before[name]).all() for name in before)


@pytest.mark.parametrize("parts", [1, 2])
def test_batch_with_samples_moves_running_statistics(parts):
    net = make_net(norm=True)
    gradient, _ = gradient_of_a_step(net, batch_of(7, 7, parts), settings(accumulate=parts))
    assert (gradient["2.running_mean"] != 0).any()
    assert (gradient["2.running_var"] != 0).any()


@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize("operator", [None, "1", "device"])
def test_statistics_of_a_first_norm_without_parameters_move(monkeypatch, hybridize, operator):
    """Nothing before it needs a gradient, and it is in backward that MXNet moves them.

    Here they are frozen in the first step, which leaves them alone.
    """
    net = nn.HybridSequential()
    net.add(nn.BatchNorm(scale=False, center=False), nn.Dense(4))
    net.initialize()
    net(mx.nd.zeros((1, 1, 5, 5)))
    if operator is not None:  # as on a rank that has peers, on CPUs or GPUs
        monkeypatch.setenv("BATCH_NORM_NATIVE", operator)
        monkeypatch.setattr(RankSum, "size", 2)
        monkeypatch.setattr(RankSum, "_allreduce", lambda self, values, name="": 2 * values)
        monkeypatch.setattr(RankSum, "connect", lambda *_: None)
        monkeypatch.setattr(RankSum, "on_device", lambda self, array: 2 * array)
        batch_norm.convert_sync_batch_norm(net)
    for frozen in (True, False):
        kernel_arguments(net[0])["use_global_stats"] = frozen
        if hybridize:
            net.hybridize(static_alloc=True)
        gradient_of_a_step(net, batch_of(6, 6, 2), settings(accumulate=2))
    mean, variance = (net[0].running_mean.data(), net[0].running_var.data())
    halves = DATA[:3], DATA[3:6]
    expected = [0.1 * (0.9 * halves[0].mean() + halves[1].mean())]
    expected.append(0.81 + 0.1 * (0.9 * halves[0].var() + halves[1].var()))
    np.testing.assert_allclose([mean.asscalar(), variance.asscalar()], expected, rtol=1e-5)


def test_empty_micro_batches_leave_running_statistics_alone():
    """2 samples in 5 parts: two updates of the statistics, as 2 parts make them."""
    statistics = []
    for parts in (2, 5):
        net = make_net(norm=True)
        gradient_of_a_step(net, batch_of(2, 2, parts), settings(accumulate=parts))
        statistics.append(values(net))
    for name in ("2.running_mean", "2.running_var"):
        np.testing.assert_allclose(statistics[0][name], statistics[1][name], rtol=1e-6)


@pytest.mark.parametrize("synced", [False, True])
def test_stand_in_leaves_running_statistics_alone_where_batch_norm_has_no_peers(synced):
    """As of one rank, or of the only one of its node, with micro-batches that have no samples."""
    net = make_net(norm=True)
    if synced:
        batch_norm.convert_sync_batch_norm(net)
    before = values(net)
    kind = "sync" if synced else "local"
    config = dataclasses.replace(settings(accumulate=3), batch_norm=kind)
    gradient_of_a_step(net, batch_of(0, 4, 3), config)
    after = values(net)
    assert all((after[name] == before[name]).all() for name in before)


class Pair:
    """A process set of two ranks, in which nothing is added up."""

    def size(self):
        return 2


class Seeing(Block):
    """Notes the rows of each forward, whether it trains and whether the batch counts as empty."""

    def __init__(self):
        super().__init__()
        self.dense, self.seen = nn.Dense(4, in_units=25), []

    def forward(self, x):
        empty = bool(registry.batch_is_empty.value)
        self.seen.append((x.shape[0], autograd.is_training(), empty))
        self.data = x
        return self.dense(x.reshape((x.shape[0], -1)))


@pytest.mark.parametrize(
    "process_set, stand_in", [(Pair(), (1, True, True)), (None, (1, False, False))]
)
def test_stand_in_is_one_row_and_an_empty_batch_where_norm_is_over_ranks(process_set, stand_in):
    net = Seeing()
    net.norm = batch_norm.SyncBatchNorm(in_channels=1, process_set=process_set)
    net.initialize()
    config = dataclasses.replace(settings(accumulate=3), batch_norm="sync")
    batch = batch_of(2, 2, 3)  # of 1, 1 and 0 samples
    train_step(net, make_trainer(net, config.optimizer), batch, config)
    assert net.seen == [(1, True, False), (1, True, False), stand_in]


# ---------------------------------------------------------------- any net; nothing that waits


class Imperative(Block):
    def __init__(self):
        super().__init__()
        self.dense = nn.Dense(4, in_units=25)

    def forward(self, x):
        return self.dense(x.reshape((x.shape[0], -1)))


def test_imperative_block_learns():
    net = Imperative()
    net.initialize()
    config = settings(lr=0.5)
    trainer = make_trainer(net, config.optimizer)
    losses = [
        train_step(net, trainer, batch_of(7, 7), config).loss_sum.asscalar() for _ in range(20)
    ]
    assert losses[-1] < losses[0] / 2


class Recurrent(gluon.HybridBlock):
    """An RNN of two layers over the rows of an image, in float64."""

    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(3, 2, layout="NTC", input_size=5)
        self.dense = nn.Dense(4, in_units=15)
        self.cast("float64")

    def hybrid_forward(self, F, x):
        return self.dense(self.rnn(F.reshape(F.cast(x, "float64"), (0, 5, 5))))


@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize("kind", [rnn.RNN, rnn.LSTM, rnn.GRU])
def test_all_layers_of_an_rnn_have_gradients(kind, hybridize):
    """MXNet's own one has those of the last layer alone where none is asked of its input."""
    net = Recurrent(kind)
    net.initialize(mx.init.Uniform(0.5))
    net.hybridize(active=hybridize, static_alloc=True)
    weight, moved, losses = net.rnn.l0_i2h_weight, 1e-4, []
    for sign in (1, -1):
        weight.data()[1, 2] += sign * moved
        scores = net(mx.nd.array(DATA))
        losses.append(cross_entropy(scores, mx.nd.array(LABEL)).mean().asscalar())
        weight.data()[1, 2] -= sign * moved
    numeric = (losses[0] - losses[1]) / (2 * moved)
    before, config = weight.data().asnumpy(), settings()
    train_step(net, make_trainer(net, config.optimizer), batch_of(7, 7), config)
    found = before - weight.data().asnumpy()
    assert found[1, 2] == pytest.approx(numeric, rel=0.01, abs=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_step_does_not_wait_for_the_device(monkeypatch, accumulate):
    """But for clipping on CPUs, where waiting costs less than MXNet's kernels."""
    net = make_net(norm=True, hybridize=True)
    config = settings(accumulate=accumulate, clip_norm=1.0, name="sgd", nesterov=True)
    monkeypatch.setattr(gradients, "_on_host", lambda arrays: False)  # as on GPUs
    trainer = make_trainer(net, config.optimizer)
    batch = batch_of(7, 7)
    train_step(net, trainer, batch, config, want_norm=True)  # makes the optimizer's arrays

    def wait(*_, **__):
        raise AssertionError("the step waits for the device")

    for name in ("asnumpy", "asscalar", "wait_to_read", "__bool__"):
        monkeypatch.setattr(mx.nd.NDArray, name, wait)
    monkeypatch.setattr(mx.nd, "waitall", wait)
    train_step(net, trainer, batch, config, want_norm=True)
    monkeypatch.undo()
    mx.nd.waitall()


def test_evaluation_gives_loss_and_logits_of_each_sample_and_moves_nothing():
    net = make_net(norm=True)
    before = values(net)
    (loss,), logits = eval_step(net, batch_of(5, 5), [cross_entropy])
    assert loss.shape == (5,) and logits.shape == (5, 4)
    expected = cross_entropy(net(mx.nd.array(DATA[:5])), mx.nd.array(LABEL[:5])).asnumpy()
    assert (loss.asnumpy() == expected).all()
    after = values(net)
    assert all((after[name] == before[name]).all() for name in before)


class Two(Block):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(("recorded", "mode"), [(True, "training"), (False, "inference")])
def test_a_net_of_several_outputs_is_refused_in_one_line(recorded, mode):
    said = (
        f"in {mode} the net gives a tuple; it must be one array of scores, (batch, classes): have "
        "its forward return the first, or their sum"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"), contextlib.ExitStack() as within:
        if recorded:
            within.enter_context(autograd.record())
        forward(Two(), mx.nd.zeros((1, 1)))


def test_scores_in_float32_are_not_copied():
    class Same(Block):
        def forward(self, x):
            return x

    data = mx.nd.zeros((2, 3))
    assert forward(Same(), data) is data
    assert forward(Same(), data.astype("float64")).dtype == np.float32


def test_a_step_of_one_batch_copies_no_image_and_fills_no_array_anew(monkeypatch):
    net, config, batch = Seeing(), settings(), batch_of(7, 7)
    net.initialize()
    trainer = make_trainer(net, config.optimizer)
    train_step(net, trainer, batch, config)
    monkeypatch.setattr(gluon.Parameter, "zero_grad", None)
    monkeypatch.setattr(mx.nd, "full", None)
    train_step(net, trainer, batch, config)
    assert net.data is batch.data


@pytest.mark.parametrize("parts", [1, 3])
def test_a_mixed_sample_has_the_mean_of_both_labels_by_its_share(parts):
    share, other = RANDOM.uniform(0.1, 0.9, 7), (LABEL + 1) % 4
    mixed = Mixed(mx.nd.array(other), mx.nd.array(share))
    net = make_net()
    scores = net(mx.nd.array(DATA))
    expected = {}
    for name, of in (("loss", cross_entropy), ("hits", lambda s, y: s.argmax(axis=1) == y)):
        first, second = (of(scores, mx.nd.array(y)).asnumpy() for y in (LABEL, other))
        expected[name] = (share * first + (1 - share) * second).sum()
    batch = batch_of(7, 7, parts)._replace(mixed=mixed)
    config = settings(accumulate=parts)
    result = train_step(net, make_trainer(net, config.optimizer), batch, config)
    assert result.loss_sum.asscalar() == pytest.approx(expected["loss"], rel=1e-5)
    assert result.correct.asscalar() == pytest.approx(expected["hits"], rel=1e-5)


def test_flipped_scores_are_the_mean_with_those_of_the_mirror_image():
    net, batch = make_net(), batch_of(5, 5)
    mirrored = batch._replace(data=mx.nd.array(DATA[:5, :, :, ::-1]))
    plain, mirror = (eval_step(net, b, [])[1].asnumpy() for b in (batch, mirrored))
    (loss,), both = eval_step(net, batch, [cross_entropy], flip=True)
    np.testing.assert_allclose(both.asnumpy(), (plain + mirror) / 2, rtol=1e-5, atol=1e-6)
    assert (loss.asnumpy() == cross_entropy(both, batch.label).asnumpy()).all()
    assert abs(plain - mirror).max() > 1e-3


def test_a_step_marks_where_its_parts_end():
    net = nn.Dense(3)
    net.initialize()
    config = Config(optimizer=Optimizer(accumulate=2))
    batch = Batch(mx.nd.ones((4, 1, 2, 2)), mx.nd.array(np.zeros(4)), 4, 4, (2, 2))
    net(batch.data)
    marked = []
    train_step(net, make_trainer(net, config.optimizer), batch, config, mark=marked.append)
    assert marked == [*["forward", "backward"] * 2, "ranks", "allreduce", "update"]
    assert set(marked) == set(PARTS)

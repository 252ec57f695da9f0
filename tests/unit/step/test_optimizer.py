"""The schedule is a function of the step; the update is the one that the settings describe."""

from __future__ import annotations

import dataclasses
import math

import mxnet as mx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from mxnet import autograd, gluon
from mxnet.gluon import nn

from trainer.config import Config, Optimizer, Schedule, Train
from trainer.errors import ConfigError
from trainer.step.gradients import gradients, mean_gradients, reduce_and_update
from trainer.step.optimizer import make_optimizer, make_trainer
from trainer.step.schedule import lr_schedule, peak_lr, set_lr


def shares(schedule: Schedule, steps_per_epoch: int, epochs: int) -> list:
    """The schedule over a whole run."""
    return [
        lr_schedule(schedule, step, steps_per_epoch, epochs)
        for step in range(steps_per_epoch * epochs)
    ]


# ---------------------------------------------------------------- the schedule


def test_peak_is_lr_itself_without_a_base_batch():
    assert peak_lr(Optimizer(lr=0.3), 4096) == 0.3


@pytest.mark.parametrize("batch, expected", [(256, 0.1), (512, 0.2), (64, 0.025), (8192, 3.2)])
def test_peak_is_scaled_linearly_with_the_global_batch(batch, expected):
    assert peak_lr(Optimizer(lr=0.1, base_batch_size=256), batch) == pytest.approx(expected)


def test_constant():
    assert shares(Schedule("constant"), 3, 4) == [1.0] * 12


def test_warmup_rises_linearly_to_one():
    run = shares(Schedule("constant", warmup_epochs=2), 5, 4)
    assert run[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert run[10:] == [1.0] * 10


def test_warmup_of_part_of_an_epoch():
    run = shares(Schedule("constant", warmup_epochs=0.5), 5, 1)  # 2.5 steps
    assert run == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


def test_step_multiplies_from_each_milestone_on():
    run = shares(Schedule("step", milestones=(2, 3.5), gamma=0.1), 4, 5)
    assert run == pytest.approx([1.0] * 8 + [0.1] * 6 + [0.01] * 6)


def test_step_after_a_warmup_that_reaches_past_a_milestone():
    run = shares(Schedule("step", warmup_epochs=2, milestones=(1, 3), gamma=0.5), 2, 4)
    assert run == pytest.approx([0.25, 0.5, 0.75, 1, 0.5, 0.5, 0.25, 0.25])


def test_cosine_starts_at_one_ends_at_the_final_share_and_is_half_way_between():
    schedule = Schedule("cosine", final_lr=0.2)
    run = shares(schedule, 10, 10)
    assert run[0] == 1.0
    assert run[50] == pytest.approx(0.6)
    assert lr_schedule(schedule, 100, 10, 10) == pytest.approx(0.2)
    assert run[99] == pytest.approx(0.2, abs=1e-3)


def test_cosine_begins_after_the_warmup():
    run = shares(Schedule("cosine", warmup_epochs=1), 10, 3)
    assert run[9] == run[10] == 1.0
    progress = (np.arange(10, 30) - 10) / 20
    assert run[10:] == pytest.approx((1 + np.cos(np.pi * progress)) / 2)


def test_poly_falls_to_the_final_share_by_its_power():
    run = shares(Schedule("poly", warmup_epochs=1, power=2, final_lr=0.1), 10, 3)
    progress = (np.arange(10, 30) - 10) / 20
    assert run[10:] == pytest.approx(0.1 + 0.9 * (1 - progress) ** 2)


def test_poly_stays_at_the_final_share_after_the_last_step():
    """A benchmark measures more steps than a short run has."""
    schedule = Schedule("poly", power=0.5, final_lr=0.1)
    assert lr_schedule(schedule, 31, 10, 3) == pytest.approx(0.1)


def test_one_cycle_rises_and_falls_along_cosines():
    run = shares(Schedule("one_cycle", warmup_epochs=0.5, final_lr=0.01), 20, 2)
    rise = 0.04 + 0.96 * (1 - np.cos(np.pi * np.arange(10) / 10)) / 2
    fall = 0.01 + 0.99 * (1 + np.cos(np.pi * np.arange(30) / 30)) / 2
    assert run == pytest.approx([*rise, *fall])
    assert shares(Schedule("one_cycle"), 20, 2)[:21:20] == pytest.approx([1, 0.5])


def test_plateau_is_reduced_as_often_as_told_down_to_the_final_share():
    schedule = Schedule("plateau", patience=2, gamma=0.5, final_lr=0.2)
    assert [lr_schedule(schedule, 7, 5, 4, n) for n in range(4)] == [1, 0.5, 0.25, 0.2]
    assert lr_schedule(schedule, 7, 5, 4) == 1


def test_lr_mult_applies_where_a_pattern_fits_the_last_one_counting():
    net, start = tiny(), 0.5
    factors = {"*": 0.1, "*weight": 0.25}
    settings = Optimizer(lr=0.2, momentum=0, lr_mult=factors)
    trainer = make_trainer(net, settings)
    trained = {n: p for n, p in net.collect_params().items() if p.grad_req != "null"}
    for parameter in trained.values():
        parameter.set_data(mx.nd.full(parameter.shape, start))
    with autograd.record():
        sum(p.data().sum() for p in trained.values()).backward()
    reduce_and_update(trainer, None, False)
    for name, parameter in trained.items():
        rate = 0.2 * (0.25 if name.endswith("weight") else 0.1)
        np.testing.assert_allclose(parameter.data().asnumpy(), start - rate, rtol=1e-6)


def test_a_pattern_that_fits_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"lr_mult has 'body\.\*', which fits no parameter"):
        make_trainer(tiny(), Optimizer(lr_mult={"body.*": 0.1}))


def test_warmup_as_long_as_the_run():
    run = shares(Schedule("cosine", warmup_epochs=2), 3, 2)
    assert run == pytest.approx(np.arange(1, 7) / 6)


@given(
    name=st.sampled_from(["constant", "cosine", "step", "poly"]),
    warmup=st.floats(0, 8),
    final=st.floats(0, 1),
    steps_per_epoch=st.integers(1, 30),
    epochs=st.integers(1, 8),
    order=st.randoms(use_true_random=False),
)
def test_share_is_a_function_of_the_step_between_nothing_and_one(
    name, warmup, final, steps_per_epoch, epochs, order
):
    assume(warmup <= epochs)
    milestones = (1.0, 2.5) if name == "step" else ()
    schedule = Schedule(name, warmup, milestones, final_lr=final)
    run = shares(schedule, steps_per_epoch, epochs)
    assert all(0 <= share <= 1 and math.isfinite(share) for share in run)
    assert run[0] > 0
    steps = list(range(len(run)))
    order.shuffle(steps)
    for step in steps[:20]:
        assert lr_schedule(schedule, step, steps_per_epoch, epochs) == run[step]
    rising = math.ceil(warmup * steps_per_epoch)
    assert run[:rising] == sorted(run[:rising])
    assert run[rising:] == sorted(run[rising:], reverse=True)
    if name in ("cosine", "poly"):
        assert min(run[rising:], default=1) >= final - 1e-12


def test_set_lr_gives_the_trainer_peak_times_share():
    net = tiny()
    config = Config(
        optimizer=Optimizer(lr=0.4, base_batch_size=4),
        schedule=Schedule("constant", warmup_epochs=1),
        train=Train(epochs=2, global_batch_size=8),
    )
    trainer = make_trainer(net, config.optimizer)
    assert set_lr(trainer, config, 0, 4) == pytest.approx(0.2)
    assert trainer.learning_rate == pytest.approx(0.2)
    assert set_lr(trainer, config, 7, 4) == pytest.approx(0.8)
    assert trainer.learning_rate == pytest.approx(0.8)
    plateau = dataclasses.replace(config, schedule=Schedule("plateau", patience=1, gamma=0.5))
    assert [set_lr(trainer, plateau, 0, 4, *n) for n in ((), (1,))] == pytest.approx([0.8, 0.4])


# ---------------------------------------------------------------- the update


def tiny(seed: int = 0) -> nn.HybridSequential:
    """A layer of every kind of parameter: weights, biases, gamma, beta."""
    mx.random.seed(seed)
    net = nn.HybridSequential()
    net.add(nn.Conv2D(2, 3, in_channels=1), nn.BatchNorm(in_channels=2), nn.Flatten(), nn.Dense(3))
    net.initialize(mx.init.Uniform(0.5))
    net(mx.nd.zeros((1, 1, 4, 4))).wait_to_read()
    for name, parameter in net.collect_params().items():
        if parameter.grad_req != "null":
            parameter.set_data(mx.nd.random.uniform(0.5, 1.5, parameter.shape))
        assert parameter.data() is not None, name
    return net


def values(net) -> dict:
    return {
        name: parameter.data().asnumpy()
        for name, parameter in net._collect_params_with_prefix().items()
        if parameter.grad_req != "null"
    }


def set_gradients(net, scale: float = 1.0) -> dict:
    """Known gradients in the place of those of a backward pass."""
    with autograd.record():
        net(mx.nd.ones((2, 1, 4, 4))).sum().backward()  # marks them fresh
    random = np.random.RandomState(1)
    known = {}
    for name, parameter in net._collect_params_with_prefix().items():
        if parameter.grad_req != "null":
            known[name] = random.uniform(-1, 1, parameter.shape).astype(np.float32)
            parameter.list_grad()[0][:] = known[name] * np.float32(scale)
    return known


def norm_of(known: dict) -> float:
    return math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in known.values()))


def test_update_is_plain_sgd():
    net = tiny()
    trainer = make_trainer(net, Optimizer(lr=0.5, momentum=0))
    before, known = values(net), set_gradients(net)
    assert reduce_and_update(trainer, None, want_norm=False) is None
    for name, value in values(net).items():
        np.testing.assert_allclose(value, before[name] - 0.5 * known[name], rtol=1e-5, atol=1e-6)


def test_norms_and_biases_are_not_decayed():
    net = tiny()
    trainer = make_trainer(net, Optimizer(lr=0.5, momentum=0, weight_decay=0.1))
    before = values(net)
    set_gradients(net, scale=0.0)
    reduce_and_update(trainer, None, want_norm=False)
    for name, value in values(net).items():
        shrink = 0.95 if name in ("0.weight", "3.weight") else 1.0
        np.testing.assert_allclose(value, shrink * before[name], rtol=1e-6)


def test_norms_and_biases_are_decayed_when_asked_for():
    net = tiny()
    settings = Optimizer(lr=0.5, momentum=0, weight_decay=0.1, decay_norm_and_bias=True)
    trainer = make_trainer(net, settings)
    before = values(net)
    set_gradients(net, scale=0.0)
    reduce_and_update(trainer, None, want_norm=False)
    assert len(before) == 6
    for name, value in values(net).items():
        np.testing.assert_allclose(value, 0.95 * before[name], rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum(nesterov):
    net = tiny()
    trainer = make_trainer(net, Optimizer(lr=0.5, momentum=0.9, nesterov=nesterov))
    expected = values(net)
    momentum = {name: np.zeros_like(value) for name, value in expected.items()}
    for _ in range(3):
        known = set_gradients(net)
        reduce_and_update(trainer, None, want_norm=False)
        for name, g in known.items():
            momentum[name] = 0.9 * momentum[name] + g
            step = g + 0.9 * momentum[name] if nesterov else momentum[name]
            expected[name] = expected[name] - 0.5 * step
    for name, value in values(net).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aggregated", [0, 4])
@pytest.mark.parametrize("arguments", [{}, {"clip_gradient": 0.2}, {"multi_precision": True}])
def test_momentum_is_mxnets_to_the_last_bit(monkeypatch, aggregated, arguments):
    """However it hands arrays over: large ones and small ones."""
    monkeypatch.setenv("MXNET_OPTIMIZER_AGGREGATION_SIZE", str(aggregated))
    settings = Optimizer(lr=0.3, momentum=0.9, weight_decay=0.01, arguments=arguments)
    moved = []
    for own in (True, False):
        mx.random.seed(1)
        net = nn.Dense(150, in_units=100)
        net.initialize(mx.init.Uniform(0.5))
        trainer = make_trainer(net, settings)
        if not own:
            sgd = mx.optimizer.SGD(learning_rate=0.3, momentum=0.9, wd=0.01, **arguments)
            trainer = gluon.Trainer(net.collect_params(), sgd, kvstore=None)
        for step in range(3):
            with autograd.record():
                loss = net(mx.nd.random.uniform(-1, 1, (2, 100))) ** 2
            loss.backward()
            trainer.set_learning_rate(0.3 / (1 + step))
            trainer.step(2)
        moved.append((net.weight.data().asnumpy(), net.bias.data().asnumpy()))
        assert trainer.optimizer.num_update == 3
    np.testing.assert_array_equal(*(weight for weight, _ in moved))
    np.testing.assert_array_equal(*(bias for _, bias in moved))


def test_norm_is_that_before_clipping():
    net = tiny()
    trainer = make_trainer(net, Optimizer(lr=0.5, momentum=0))
    known = set_gradients(net)
    norm = reduce_and_update(trainer, 0.1, want_norm=True)
    assert norm.shape == (1,)
    assert norm.asscalar() == pytest.approx(norm_of(known), rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_is_exact_whether_gradients_are_summed_or_averaged(world_size, summed, limit):
    """Without NCCL Horovod leaves the sum over ranks and the trainer divides; with it, the mean."""
    net = tiny()
    trainer = make_trainer(net, Optimizer(lr=1.0, momentum=0))
    trainer._scale = 1 / world_size if summed else 1.0
    before, known = values(net), set_gradients(net, scale=world_size if summed else 1.0)
    norm = reduce_and_update(trainer, limit, want_norm=False)
    assert norm.asscalar() == pytest.approx(norm_of(known), rel=1e-5)
    shrink = min(1.0, limit / norm_of(known))
    told, parameters = mean_gradients(trainer), net._collect_params_with_prefix()
    for name, value in values(net).items():
        expected = before[name] - shrink * known[name]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        gradient = told[parameters[name].name]
        np.testing.assert_allclose(gradient, shrink * known[name], rtol=1e-5, atol=1e-7)


def test_gradients_below_the_limit_are_not_touched():
    clipped, plain = tiny(), tiny()
    for net, limit in ((clipped, 1e6), (plain, None)):
        trainer = make_trainer(net, Optimizer(lr=0.5))
        set_gradients(net)
        reduce_and_update(trainer, limit, want_norm=False)
    expected = values(plain)
    for name, value in values(clipped).items():
        assert value.tobytes() == expected[name].tobytes()


def test_zero_gradients_are_clipped_to_zero():
    net = tiny()
    trainer = make_trainer(net, Optimizer(momentum=0))
    before = values(net)
    set_gradients(net, scale=0.0)
    assert reduce_and_update(trainer, 1.0, want_norm=True).asscalar() == 0
    assert all((value == before[name]).all() for name, value in values(net).items())


def test_gradients_that_are_not_finite_are_clipped_without_a_warning():
    net = tiny()
    trainer = make_trainer(net, Optimizer(momentum=0))
    set_gradients(net, scale=np.inf)
    with np.errstate(all="raise"):
        reduce_and_update(trainer, 1.0, want_norm=True)


def test_gradients_of_what_is_trained():
    net = tiny()
    trainer = make_trainer(net, Optimizer())
    assert len(gradients(trainer)) == 6  # two weights, two biases, gamma, beta


def test_parameter_that_the_forward_does_not_use_stays():
    class Half(nn.HybridBlock):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Dense(2, in_units=3), nn.Dense(2, in_units=3)

        def hybrid_forward(self, F, x):
            return self.used(x)

    net = Half()
    net.initialize()
    trainer = make_trainer(net, Optimizer(momentum=0))
    kept, moved = net.unused.weight.data().asnumpy(), net.used.weight.data().asnumpy()
    with autograd.record():
        net(mx.nd.ones((1, 3))).sum().backward()
    reduce_and_update(trainer, 1.0, want_norm=True)
    assert (net.unused.weight.data().asnumpy() == kept).all()
    assert (net.used.weight.data().asnumpy() != moved).any()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_parameter_that_one_step_does_not_use_has_no_gradient_in_it(accumulate):
    """The last step's would be left; with momentum the update itself is not skipped."""
    layers = nn.Dense(1, in_units=1, use_bias=False), nn.Dense(1, in_units=1, use_bias=False)
    net = nn.Sequential()
    net.add(*layers)
    net.initialize(mx.init.One())
    trainer = make_trainer(net, Optimizer(lr=0.1, momentum=0.5, accumulate=accumulate))
    one = mx.nd.ones((1, 1))
    for block in (net, layers[0]):
        if accumulate > 1:  # as a step begins that adds up micro-batches
            for layer in layers:
                layer.weight.zero_grad()
        with autograd.record():
            block(one).backward()
        norm = reduce_and_update(trainer, None, want_norm=True)
    # 1 - 0.1 = 0.9, then by half of that step: 0.9 - 0.05, although it had no gradient.
    assert layers[1].weight.data().asscalar() == pytest.approx(0.85)
    assert norm.asscalar() == pytest.approx(1.0)  # of the first layer's gradient alone


# ---------------------------------------------------------------- names and arguments

# Without the one for MXNet's own tests, and the one that takes matrices only.
NAMES = sorted(set(mx.optimizer.Optimizer.opt_registry) - {"test", "groupadagrad"})


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_of_mxnet_takes_a_step(name):
    net = tiny()
    trainer = make_trainer(net, Optimizer(name, lr=0.01, weight_decay=1e-4))
    trainer.set_learning_rate(0.005)
    before = values(net)
    for _ in range(2):
        set_gradients(net)
        reduce_and_update(trainer, 1.0, want_norm=True)
    after = values(net)
    assert all(np.isfinite(value).all() for value in after.values())
    assert any((after[name] != before[name]).any() for name in before)


def test_nesterov_is_mxnets_nag():
    optimizer = make_optimizer(Optimizer("sgd", nesterov=True, momentum=0.8))
    assert type(optimizer).__name__ == "NAG" and optimizer.momentum == 0.8


def test_name_may_be_in_capitals():
    assert type(make_optimizer(Optimizer("Adam"))).__name__ == "Adam"


def test_further_arguments_reach_the_optimizer():
    optimizer = make_optimizer(Optimizer("adam", arguments={"beta1": 0.5, "epsilon": 1e-3}))
    assert (optimizer.beta1, optimizer.epsilon) == (0.5, 1e-3)


@pytest.mark.parametrize(
    "settings, expected",
    [
        (Optimizer("sdg"), ["optimizer.name", "'sdg'", "did you mean sgd?", "adam"]),
        (Optimizer("zzz"), ["optimizer.name", "'zzz'", "adam", "sgd"]),
        (Optimizer("sgd", arguments={"beta1": 0.5}), ["optimizer.arguments", "sgd", "beta1"]),
        (Optimizer("adam", arguments={"lr": 1}), ["optimizer.arguments", "adam", "lr"]),
        (Optimizer("adam", arguments={"beta1": "abc"}), ["optimizer.arguments", "adam"]),
        (Optimizer("sgd", arguments={"clip_gradient": "abc"}), ["sgd", "clip_gradient"]),
        (Optimizer("sgd", arguments={"lr_scheduler": 3}), ["lr_scheduler", "schedule"]),
        (Optimizer("lbsgd", arguments={"batch_scale": 2}), ["batch_scale", "optimizer.accumulate"]),
        (Optimizer("groupadagrad"), ["groupadagrad", "AssertionError"]),
        (Optimizer("sgd", lr=1e300), ["sgd", "1e+300"]),
        (
            Optimizer("adam", arguments={"learning_rate": 1}),
            ["optimizer.arguments", "learning_rate", "optimizer.lr"],
        ),
        (
            Optimizer("adam", arguments={"wd": 1}),
            ["optimizer.arguments", "wd", "optimizer.weight_decay"],
        ),
    ],
)
def test_what_is_wrong_with_an_optimizer_is_reported_in_one_line(settings, expected):
    with pytest.raises(ConfigError) as raised:
        make_optimizer(settings)
    text = str(raised.value)
    assert "\n" not in text
    for part in expected:
        assert part in text


@pytest.mark.parametrize("kept", [[0], {0: 0}, np.zeros(2), mx.nd.zeros(2)])
def test_an_optimizer_whose_updates_change_what_no_checkpoint_holds_is_refused(monkeypatch, kept):
    class Keeping(mx.optimizer.Optimizer):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.mean, self.table, self.unpicklable = kept, {"a": 1}, lambda: 0

        def update(self, index, weight, gradient, state):
            self.mean[0] += 1

    monkeypatch.setitem(mx.optimizer.Optimizer.opt_registry, "keeping", Keeping)
    said = r"^optimizer.name is 'keeping', whose update changes its mean, a \w+, which no check"
    with pytest.raises(ConfigError, match=said):
        make_optimizer(Optimizer("keeping"))

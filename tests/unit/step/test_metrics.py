"""Means are sums over counts; a non-finite loss is reported with its step."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mxnet import gluon

from trainer.step.evaluation import Evaluation
from trainer.step.metrics import NonFiniteError, TrainMetrics
from trainer.step.step import StepResult

CPU = mx.cpu()


def add(metrics: TrainMetrics, step: int, loss_sum: float, correct: int, count: int) -> None:
    metrics.add(step, StepResult(mx.nd.array([loss_sum]), mx.nd.array([correct]), None), count)


@given(
    st.lists(
        st.tuples(st.floats(0, 100, width=32), st.integers(0, 50), st.integers(0, 50)),
        min_size=1,
        max_size=8,
    )
)
def test_means_weigh_steps_by_their_samples(steps):
    metrics = TrainMetrics(CPU)
    steps = [*steps, (1.0, 1, 4)]  # a rank may have steps without samples, not only such
    for step, (loss_sum, correct, count) in enumerate(steps):
        add(metrics, step, loss_sum, correct, count)
    means = metrics.read()
    loss_sum, correct, count = np.sum(steps, axis=0)
    assert means.loss == pytest.approx(loss_sum / count, rel=1e-5)
    assert means.accuracy == pytest.approx(correct / count)


def test_a_window_may_have_more_steps_than_are_kept_apart():
    metrics = TrainMetrics(CPU)
    for step in range(350):
        add(metrics, step, step, 1, 2)
    assert metrics.read() == (sum(range(350)) / 700, 0.5)
    for step in range(350):
        add(metrics, step, float("nan") if step in (202, 303) else 1.0, 1, 2)
    with pytest.raises(NonFiniteError, match="step 202"):
        metrics.read()


def test_windows_and_epochs_are_apart():
    metrics = TrainMetrics(CPU)
    add(metrics, 0, 2.0, 1, 4)
    add(metrics, 1, 6.0, 3, 4)
    assert metrics.read() == (1.0, 0.5)
    add(metrics, 2, 4.0, 2, 2)
    assert metrics.read() == (2.0, 1.0)
    assert metrics.read_epoch() == (1.2, 0.6)
    add(metrics, 3, 9.0, 0, 3)
    assert metrics.read_epoch() == (3.0, 0.0)  # the window goes on
    add(metrics, 4, 1.0, 2, 2)
    assert metrics.read() == (2.0, 0.4)
    assert metrics.read_epoch() == (0.5, 1.0)


def test_reading_totals_changes_no_mean():
    often, once = TrainMetrics(CPU), TrainMetrics(CPU)
    for step in range(6):
        for metrics in (often, once):
            add(metrics, step, float(step), step % 2, 2)
        often.totals()
    assert often.totals() == [[15.0, 3.0, 12.0], [15.0, 3.0, 12.0]]
    assert often.read() == once.read()
    assert often.read_epoch() == once.read_epoch()


@given(st.lists(st.floats(0, 10, width=32), min_size=2, max_size=12), st.data())
def test_a_run_resumed_from_totals_reads_the_same_bit_for_bit(losses, data):
    saved_after = data.draw(st.integers(1, len(losses) - 1))
    read_after = data.draw(st.integers(0, saved_after - 1))
    whole, resumed = TrainMetrics(CPU), None
    for step, loss in enumerate(losses):
        for metrics in (whole, resumed):
            if metrics is not None:
                add(metrics, step, loss, 1, 3)
        if step + 1 == read_after:
            whole.read()
        if step + 1 == saved_after:
            resumed = TrainMetrics(CPU, whole.totals())
    assert resumed.read() == whole.read()
    assert resumed.read_epoch() == whole.read_epoch()


@given(st.lists(st.tuples(st.floats(0, 10, width=32), st.booleans()), min_size=1, max_size=30))
def test_where_sums_are_taken_over_changes_no_bit(losses):
    often, once = TrainMetrics(CPU), TrainMetrics(CPU)
    for step, (loss, cut) in enumerate(losses):
        for metrics in (often, once):
            add(metrics, step, loss, 1, 3)
        if cut:
            often.read(end=False)
            often.read_epoch(end=False)
            often = TrainMetrics(CPU, often.totals())
    assert often.read() == once.read()
    assert often.read_epoch() == once.read_epoch()


def test_totals_do_not_leak_from_one_object_to_the_next():
    first = TrainMetrics(CPU)
    add(first, 0, 1.0, 1, 1)
    saved = first.totals()
    TrainMetrics(CPU, saved).read()
    assert saved == [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    assert TrainMetrics(CPU).totals() == [[0.0] * 3] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("read", ["read", "read_epoch", "totals"])
def test_loss_that_is_not_finite_names_its_first_step(bad, read):
    metrics = TrainMetrics(CPU)
    for step in range(100, 110):
        add(metrics, step, bad if step in (104, 107) else 1.0, 0, 2)
    with pytest.raises(NonFiniteError, match="step 104") as raised:
        getattr(metrics, read)()
    assert raised.value.step == 104


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_lost_weight_is_found_though_the_loss_is_finite(bad: float, dtype: str) -> None:
    """As with ReLU behind it, which makes 0 of NaN on CPUs."""
    parameters = [gluon.Parameter(f"p{i}", shape=(2,), dtype="float32") for i in range(300)]
    parameters += [gluon.Parameter("lost", shape=(3,), dtype=dtype)]
    parameters += [gluon.Constant("counts", mx.nd.array([1], dtype="int32"))]
    parameters += [gluon.Constant("mask", mx.nd.array([-np.inf]))]
    for parameter in parameters:
        parameter.initialize()
    metrics = TrainMetrics(CPU, parameters=parameters)
    add(metrics, 6, 1.0, 0, 2)
    metrics.read()
    add(metrics, 7, 1.0, 0, 2)
    parameters[300].set_data(mx.nd.array([1, bad, 1], dtype=dtype))
    with pytest.raises(NonFiniteError, match="weights were found not finite at step 7"):
        metrics.read()


def test_step_zero_may_be_the_bad_one():
    metrics = TrainMetrics(CPU)
    add(metrics, 0, float("nan"), 0, 2)
    with pytest.raises(NonFiniteError) as raised:
        metrics.read()
    assert raised.value.step == 0


def test_high_step_numbers_are_exact():
    metrics = TrainMetrics(CPU)
    add(metrics, 2**24 - 1, float("nan"), 0, 2)
    with pytest.raises(NonFiniteError) as raised:
        metrics.read()
    assert raised.value.step == 2**24 - 1


def test_adding_does_not_wait_for_the_device(monkeypatch):
    metrics = TrainMetrics(CPU)
    result = StepResult(mx.nd.array([1.0]), mx.nd.array([1.0]), None)

    def wait(*_):
        raise AssertionError("the metrics wait for the device")

    for name in ("asnumpy", "asscalar", "wait_to_read", "__bool__"):
        monkeypatch.setattr(mx.nd.NDArray, name, wait)
    metrics.add(0, result, 2)


def test_accuracy_of_classes():
    confusion = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 2]])
    evaluation = Evaluation(0.5, 5 / 8, confusion, 8)
    np.testing.assert_array_equal(evaluation.class_accuracy, [0.75, np.nan, 0.5])
    assert evaluation.scalars() == {"loss": 0.5, "accuracy": 0.625}

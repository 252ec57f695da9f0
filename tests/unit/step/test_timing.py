"""Which steps are timed, and the metrics computed from the ranks' times."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from trainer import dist
from trainer.batch_norm.rank_sum import registry
from trainer.step import timing


def test_the_first_step_after_a_reading_is_timed_once_all_is_warm():
    clock = timing.Timing(every=10, first_step=15)
    timed = [step for step in range(45) if clock.of(step) is not timing.unmarked]
    assert timed == [20, 30, 40]
    assert all(timing.Timing(None, 0).of(step) is timing.unmarked for step in range(30))


def test_one_rank_tells_its_own_compute_time(monkeypatch):
    seconds = iter([10.0, 10.01, 10.03, 10.05])
    clocked = functools.partial(timing.StepClock, clock=lambda: next(seconds))
    monkeypatch.setattr(timing, "StepClock", clocked)
    clock = timing.Timing(every=1, first_step=0)
    mark = clock.of(0)
    mark("forward")
    mark("backward")
    mark("allreduce")
    figures = clock.read()
    assert sorted(figures) == [
        "speed/compute_ms_slowest_rank",
        "system/memory_megabytes_largest_rank",
    ]
    assert figures["speed/compute_ms_slowest_rank"] == pytest.approx(30)
    assert sorted(clock.read()) == ["system/memory_megabytes_largest_rank"], "told once"


def test_waiting_in_batch_norm_is_not_computing(monkeypatch):
    seconds = iter([10.0, 10.01, 10.05, 10.06])
    clocked = functools.partial(timing.StepClock, clock=lambda: next(seconds))
    monkeypatch.setattr(timing, "StepClock", clocked)
    clock = timing.Timing(every=1, first_step=0)
    mark = clock.of(0)
    monkeypatch.setattr(registry, "seconds", registry.seconds + 0.02)
    for part in ("forward", "backward", "allreduce"):
        mark(part)
    monkeypatch.setattr(registry, "seconds", registry.seconds + 7)  # in later steps
    figures = clock.read()
    assert figures["speed/compute_ms_slowest_rank"] == pytest.approx(30)
    assert figures["speed/batch_norm_sums_ms"] == pytest.approx(20)


def test_clock_books_time_on_the_part_that_ends():
    now, waits = iter([0.0, 1.0, 3.0, 6.0, 10.0]), []
    clock = timing.StepClock(wait=lambda: waits.append(None), clock=lambda: next(now))
    for part in ("data", "forward", "data", "other"):
        clock.mark(part)
    assert clock.seconds == {"data": 1 + 3, "forward": 2, "other": 4}
    assert len(waits) == 5


def read(monkeypatch, *rows: list) -> dict:
    """What is read where the ranks' rows are these."""
    monkeypatch.setattr(dist, "world_size", lambda: len(rows))
    monkeypatch.setattr(dist, "allreduce_sum", lambda table, name: np.array(rows, np.float64))
    return timing.Timing(every=1, first_step=0).read()


def test_the_slowest_rank_is_named_and_who_waits_for_it_is_seen(monkeypatch):
    """Rank 1 computes 20 ms longer, so the others wait in the allreduce, which itself takes 5."""
    figures = read(monkeypatch, [0.1, 0, 0.025, 1e6], [0.12, 0, 0.005, 3e6], [0.1, 0, 0.024, 2e6])
    assert figures == pytest.approx(
        {
            "speed/compute_ms_slowest_rank": 120,
            "speed/compute_ms_fastest_rank": 100,
            "speed/slowest_rank": 1,
            "speed/spread_percent": 20,
            "speed/allreduce_ms": 5,
            "speed/waiting_ms": 20,
            "system/memory_megabytes_largest_rank": 3,
        }
    )


def test_sums_of_batch_norm_are_reported_where_there_are_any(monkeypatch):
    figures = read(monkeypatch, [0.1, 0.004, 0.01, 1], [0.1, 0.003, 0.01, 1])
    assert figures["speed/batch_norm_sums_ms"] == pytest.approx(3)


def test_a_rank_that_timed_nothing_leaves_the_times_out(monkeypatch):
    nothing = [np.nan] * 3
    figures = read(monkeypatch, [0.1, 0, 0.01, 1], [*nothing, 1])
    assert list(figures) == ["system/memory_megabytes_largest_rank"]

"""Throughput counts the time and images of training steps only."""

from __future__ import annotations

import pytest

from trainer.step.timing import Throughput


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def throughput(clock):
    return Throughput(clock)


def train(clock, throughput, steps, images=10, seconds=2.0):
    for _ in range(steps):
        clock.now += seconds
        throughput.step(images)


def test_warm_up_is_left_out(clock, throughput):
    train(clock, throughput, 5, seconds=100.0)
    throughput.begin()
    train(clock, throughput, 4)
    throughput.end()
    assert throughput.read() == 5.0
    assert throughput.overall == 5.0


def test_pauses_are_left_out(clock, throughput):
    throughput.begin()
    train(clock, throughput, 3)
    throughput.end()
    clock.now += 500  # an evaluation
    throughput.begin()
    train(clock, throughput, 1)
    throughput.end()
    assert throughput.read() == 5.0


def test_readings_are_of_their_own_window_and_overall_of_all(clock, throughput):
    throughput.begin()
    train(clock, throughput, 2, seconds=1.0)
    throughput.end()
    assert throughput.read() == 10.0
    throughput.begin()
    train(clock, throughput, 2, seconds=4.0)
    throughput.end()
    assert throughput.read() == 2.5
    assert throughput.overall == 4.0  # 40 images in 10 seconds: no mean of means


def test_nothing_timed_is_none_and_not_an_error(clock, throughput):
    assert throughput.read() is None and throughput.overall is None
    train(clock, throughput, 3)
    throughput.end()  # never begun
    assert throughput.read() is None
    throughput.begin()
    throughput.end()  # no second passed
    assert throughput.read() is None and throughput.overall is None


def test_reading_twice_reads_nothing_new(clock, throughput):
    throughput.begin()
    train(clock, throughput, 2)
    throughput.end()
    throughput.read()
    assert throughput.read() is None
    assert throughput.overall == 5.0


def test_beginning_again_drops_what_was_not_ended(clock, throughput):
    throughput.begin()
    train(clock, throughput, 7)
    throughput.begin()
    train(clock, throughput, 1)
    throughput.end()
    assert throughput.read() == 5.0


def test_uneven_batches_count_as_they_are(clock, throughput):
    throughput.begin()
    train(clock, throughput, 1, images=128, seconds=1.0)
    train(clock, throughput, 1, images=32, seconds=1.0)
    throughput.end()
    assert throughput.read() == 80.0

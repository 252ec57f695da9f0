"""The user's generators are given back, and a step's numbers depend on (seed, step, rank) alone."""

from __future__ import annotations

import random

import mxnet as mx
import numpy as np

from trainer.data import randomness


def drawn() -> list:
    return [random.random(), np.random.uniform(), mx.nd.random.uniform().asscalar()]


def test_a_steps_numbers_are_repeated():
    randomness.seed_step(1, 5, 0)
    first = drawn()
    drawn()
    randomness.seed_step(1, 5, 0)
    assert drawn() == first
    for other in ((2, 5, 0), (1, 6, 0), (1, 5, 1)):
        randomness.seed_step(*other)
        assert all(a != b for a, b in zip(drawn(), first))


def test_the_users_generators_go_on_where_they_were():
    randomness.seed_all(3)
    expected = drawn()[:2], drawn()[:2]
    randomness.seed_all(3)
    assert drawn()[:2] == expected[0]
    with randomness.kept():
        randomness.seed_all(7)
        drawn()
    assert drawn()[:2] == expected[1]


def test_mxnets_generator_does_not_repeat_itself_after_each_use():
    """A random search around fit() would draw the same numbers again and again."""
    seen = []
    for _ in range(3):
        with randomness.kept():
            randomness.seed_all(7)
        seen.append(mx.nd.random.uniform().asscalar())
    assert len(set(seen)) == 3

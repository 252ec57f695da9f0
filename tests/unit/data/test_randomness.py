"""The user's generators are given back, and a step's numbers depend on (seed, step, rank) alone."""

from __future__ import annotations

import json
import random

import mxnet as mx
import numpy as np
from mxnet.gluon import nn

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


def test_mxnets_generators_can_be_left_alone():
    randomness.seed_all(5)
    first = drawn()
    randomness.seed_all(5, mxnet=False)
    *others, mxnets = drawn()
    assert others == first[:2] and mxnets != first[2]


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


def test_dropout_is_not_cudnns_which_no_seed_reaches():
    def traced(net) -> str:
        return json.loads(net(mx.sym.var("x")).tojson())["nodes"][-1]["attrs"]["cudnn_off"]

    class Own(nn.HybridBlock):
        def hybrid_forward(self, F, x):
            return F.Dropout(x, p=0.5)

    plain = mx.nd.Dropout, mx.sym.Dropout
    with randomness.seeded_dropout():
        assert traced(nn.Dropout(0.5)) == traced(Own()) == "True"
        for net in (nn.Dropout(0.5), Own()):
            with mx.autograd.train_mode():
                assert (net(mx.nd.ones(100)).asnumpy() == 0).any()
    assert (mx.nd.Dropout, mx.sym.Dropout) == plain
    assert traced(nn.Dropout(0.5)) == "False"

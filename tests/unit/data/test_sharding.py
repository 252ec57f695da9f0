"""Every sample once per epoch, on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.sharding import (
    epoch_order,
    global_batch,
    micro_shards,
    shard,
    step_seed,
    steps_per_epoch,
    uniform,
)

sizes = st.integers(1, 200)
seeds = st.integers(0, 2**31 - 1)
epochs = st.integers(0, 10_000)


def test_numbers_are_those_of_earlier_versions():
    """A run that was stopped goes on as it would have."""
    assert epoch_order(6, 7, 3).tolist() == [4, 0, 5, 3, 1, 2]
    assert uniform(7, 3, np.array([0, 5]), 2).tolist() == [
        [0.8862157328090131, 0.6043421568528298],
        [0.519512004342672, 0.5714754848802869],
    ]
    assert step_seed(7, 3, 1) == 632810526
    assert [part.tolist() for part in micro_shards(np.arange(8), 2, 1, 3)] == [[1], [6, 7]]


@given(size=sizes, global_batch_size=sizes, world_size=st.integers(1, 9), seed=seeds, epoch=epochs)
def test_an_epoch_visits_each_sample_once(size, global_batch_size, world_size, seed, epoch):
    order = epoch_order(size, seed, epoch)
    seen = []
    steps = steps_per_epoch(size, global_batch_size)
    for batch in range(steps):
        whole = global_batch(order, global_batch_size, batch)
        last = batch == steps - 1
        assert len(whole) == (size - batch * global_batch_size if last else global_batch_size)
        shards = [shard(whole, rank, world_size) for rank in range(world_size)]
        assert np.concatenate(shards).tolist() == whole.tolist()
        lengths = [len(one) for one in shards]
        assert max(lengths) - min(lengths) <= 1
        seen += whole.tolist()
    assert sorted(seen) == list(range(size))
    assert len(global_batch(order, global_batch_size, steps)) == 0


@given(size=sizes, parts=st.integers(1, 9), world_size=st.integers(1, 9))
def test_micro_batches_do_not_depend_on_the_number_of_ranks(size, parts, world_size):
    indices = np.arange(size) + 5
    ranks = [micro_shards(indices, parts, rank, world_size) for rank in range(world_size)]
    for part, whole in enumerate(micro_shards(indices, parts, 0, 1)):
        assert sorted(np.concatenate([shards[part] for shards in ranks])) == whole.tolist()
    assert np.concatenate(micro_shards(indices, parts, 0, 1)).tolist() == indices.tolist()


def test_ranks_take_turns_at_the_larger_shards():
    totals = [sum(map(len, micro_shards(np.arange(128), 8, rank, 3))) for rank in range(3)]
    assert max(totals) - min(totals) <= 1


def test_ranks_without_a_sample_get_an_empty_shard():
    shards = [shard(np.array([7, 3]), rank, 5) for rank in range(5)]
    assert sorted(len(one) for one in shards) == [0, 0, 0, 1, 1]
    assert sorted(np.concatenate(shards)) == [3, 7]


def test_empty_batch_is_empty_on_every_rank():
    assert all(len(shard(np.arange(0), rank, 3)) == 0 for rank in range(3))


@given(size=sizes, seed=seeds, epoch=epochs)
def test_order_is_a_function_of_seed_and_epoch(size, seed, epoch):
    np.random.seed(epoch % 2**31)  # the global state must not matter
    first = epoch_order(size, seed, epoch)
    np.random.seed(seed)
    assert first.dtype == np.int64
    assert epoch_order(size, seed, epoch).tolist() == first.tolist()


def test_order_changes_with_seed_and_epoch():
    orders = [epoch_order(50, seed, epoch).tolist() for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16


def test_order_is_fair():
    """Each sample is first about as often as any other: chi-square over 20 places."""
    first = np.bincount([epoch_order(20, 1, epoch)[0] for epoch in range(2000)], minlength=20)
    assert ((first - 100) ** 2 / 100).sum() < 43.8  # p = 0.001 at 19 degrees of freedom


@given(seed=seeds, epoch=epochs, indices=st.lists(st.integers(0, 2**40), max_size=20))
def test_draws_belong_to_the_sample_whatever_batch_it_is_asked_in(seed, epoch, indices):
    together = uniform(seed, epoch, np.array(indices, np.int64), 3)
    assert together.shape == (len(indices), 3) and together.dtype == np.float64
    assert ((together >= 0) & (together < 1)).all()
    for index, row in zip(indices, together):
        assert uniform(seed, epoch, np.array([index]), 3)[0].tolist() == row.tolist()
        assert (
            uniform(seed, epoch, np.array([index], np.int32 if index < 2**31 else None), 2)[
                0
            ].tolist()
            == row[:2].tolist()
        )


def test_draws_change_with_seed_epoch_sample_and_draw():
    draws = np.concatenate(
        [uniform(seed, epoch, np.arange(20), 5) for seed in range(8) for epoch in range(8)]
    )
    assert len(np.unique(draws)) == draws.size


def test_seed_and_epoch_do_not_stand_in_for_each_other():
    assert not np.array_equal(uniform(1, 2, np.arange(4), 2), uniform(2, 1, np.arange(4), 2))
    assert not np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 2, 1))


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(lambda: uniform(0, 0, np.arange(20_000), 1)[:, 0], id="samples"),
        pytest.param(lambda: uniform(0, 0, np.array([5]), 20_000)[0], id="draws"),
        pytest.param(
            lambda: np.array([uniform(3, e, np.array([5]), 1)[0, 0] for e in range(5000)]),
            id="epochs",
        ),
        pytest.param(
            lambda: np.array([uniform(s, 3, np.array([5]), 1)[0, 0] for s in range(5000)]),
            id="seeds",
        ),
    ],
)
def test_draws_are_uniform_and_independent(numbers):
    x = numbers()
    n = len(x)
    # Each bound is about four standard deviations of the estimate.
    assert abs(x.mean() - 0.5) < 4 * np.sqrt(1 / 12 / n)
    assert abs(x.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / n)
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 4 / np.sqrt(n)
    counts = np.histogram(x, 20, (0, 1))[0]
    assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 43.8


def test_draws_of_one_sample_are_uncorrelated():
    x = uniform(0, 0, np.arange(10_000), 8)
    off_diagonal = np.corrcoef(x.T) - np.eye(8)
    assert np.abs(off_diagonal).max() < 4.5 / np.sqrt(10_000)


@given(seed=seeds, step=st.integers(0, 10**7), rank=st.integers(0, 4096))
def test_step_seed_is_one_that_mxnet_takes(seed, step, rank):
    value = step_seed(seed, step, rank)
    assert isinstance(value, int) and 0 <= value < 2**31
    assert step_seed(seed, step, rank) == value


def test_step_seed_changes_with_seed_step_and_rank():
    values = {step_seed(a, b, c) for a in range(5) for b in range(20) for c in range(5)}
    assert len(values) == 500

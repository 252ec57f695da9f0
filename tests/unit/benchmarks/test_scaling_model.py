"""The scaling model, compared to calculations by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling_model import (
    Cluster,
    Horovod,
    Layer,
    Link,
    allreduce,
    bucketed,
    compute,
    last_sum,
    ring,
    scaled,
    step,
    tree,
)

SLOW, FAST = Link(1e-3, 1e6), Link(1e-6, 1e9)
INSTANT = Horovod(cycle=0.0)
FUSING = Horovod(cycle=0.0, fusion_bytes=128 * 2**20)
LAYERS = [Layer("a", 0.1, 0.2, 1000), Layer("b", 0.2, 0.3, 3000, (16,))]


def test_ring_is_two_rounds_of_chunks():
    # Four ranks: 3 steps of reducing and 3 of gathering, a quarter of the bytes in each.
    assert ring(4_000_000, 4, SLOW) == pytest.approx(6 * (1e-3 + 1.0))
    assert ring(8, 1, SLOW) == 0


@given(st.integers(2, 4096), st.integers(1, 10**9))
def test_ring_moves_at_most_twice_the_bytes(ranks, size):
    alone = ring(size, ranks, Link(0.0, 1.0))
    assert size <= alone * (1 + 1e-9) and alone < 2 * size


def test_flat_ring_goes_at_the_pace_of_the_network_and_one_node_of_its_own_link():
    assert allreduce(1e6, Cluster(16, SLOW, 8, FAST)) == ring(1e6, 16, SLOW)
    assert allreduce(1e6, Cluster(8, SLOW, 8, FAST)) == ring(1e6, 8, FAST)
    assert allreduce(1e6, Cluster(1, SLOW)) == 0


def test_hierarchical_ring_is_one_within_nodes_and_one_between():
    found = allreduce(1e6, Cluster(32, SLOW, 8, FAST, hierarchical=True))
    assert found == pytest.approx(ring(1e6, 8, FAST) + ring(1e6, 4, SLOW))
    assert found < allreduce(1e6, Cluster(32, SLOW, 8, FAST))


def test_tree_serves_small_messages_only():
    cluster = Cluster(1024, SLOW, 8, FAST, trees=True)
    assert allreduce(8, cluster) == tree(8, 1024, SLOW) == pytest.approx(20 * (1e-3 + 8e-6))
    assert allreduce(1e8, cluster) == ring(1e8, 1024, SLOW)


def test_what_is_ready_while_another_travels_is_sent_together():
    cluster = Cluster(2, SLOW)  # n bytes take 2e-3 + n / 1e6 seconds
    ready = [(0.0, 1e6), (0.1, 1e5), (0.2, 1e5)]
    assert last_sum(ready, cluster, FUSING) == pytest.approx(1.002 + 0.202)
    assert last_sum(ready, cluster, INSTANT) == pytest.approx(1.002 + 2 * 0.102)


def test_buffers_are_cut_at_the_threshold():
    cluster = Cluster(2, SLOW)
    ready = [(0.0, 3e5)] * 4
    assert last_sum(ready, cluster, FUSING) == pytest.approx(2e-3 + 1.2)
    cut = Horovod(cycle=0.0, fusion_bytes=600_000)
    assert last_sum(ready, cluster, cut) == pytest.approx(2 * (2e-3 + 0.6))


def test_a_gradient_waits_for_the_next_look():
    cluster = Cluster(2, SLOW)
    ready = [(0.0, 1.0), (0.01, 1.0)]
    found = last_sum(ready, cluster, Horovod(cycle=0.5))
    assert found == pytest.approx(0.25 + 2 * 2e-3, abs=1e-5)  # both in the middle of a cycle
    queued = last_sum([(0.0, 1e6), (0.5, 1.0)], cluster, Horovod(cycle=0.3))
    assert queued == pytest.approx(0.15 + 1.002 + 2e-3, abs=1e-5)  # sent at once, when it is free
    soon = last_sum([(0.0, 1.0), (0.3, 1.0)], cluster, Horovod(cycle=0.5))
    assert soon == pytest.approx(0.25 + 0.5 + 2e-3, abs=1e-5)
    asked = last_sum(ready[:1], cluster, Horovod(cycle=0.0, request=0.3))
    assert asked == pytest.approx(0.302, abs=1e-5)


def test_buckets_are_ready_with_the_gradient_that_fills_them():
    ready = [(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)]
    assert bucketed(ready, math.inf) == [(3.0, 60.0)]
    assert bucketed(ready, 25) == [(2.0, 30.0), (3.0, 30.0)]
    assert bucketed(ready, 0) == ready


def test_one_bucket_hides_nothing_and_single_gradients_hide_behind_backward():
    cluster = Cluster(2, Link(0.0, 10_000))
    alone = step(LAYERS, cluster, Horovod(cycle=0.0, bucket_bytes=math.inf))
    # Backward ends at 0.8; 4,000 bytes take 0.4 s.
    assert alone == pytest.approx((0.3, 0.8, 1.2, 1.2))
    # The last layer's 3,000 are sent from 0.6 to 0.9, the first's 1,000 after it.
    assert step(LAYERS, cluster, INSTANT) == pytest.approx((0.3, 0.8, 1.0, 1.0))


def test_a_core_that_copies_gradients_does_not_compute_meanwhile():
    cluster, host = Cluster(2, Link(0.0, 10_000)), Horovod(cycle=0.0, host=1e-4)
    # 0.4 s of copying on top of backward's 0.8, part of which the wire alone would have hidden.
    assert step(LAYERS, cluster, host) == pytest.approx((0.3, 0.8, 1.0, 1.2))
    # Where nothing is hidden the copying is part of the sum.
    assert step(LAYERS, cluster, replace(host, bucket_bytes=math.inf)).step == pytest.approx(1.2)
    assert step(LAYERS, Cluster(1, SLOW), host).step == pytest.approx(0.8)


def test_half_precision_halves_the_bytes_and_costs_the_rounding():
    cluster = Cluster(2, Link(0.0, 10_000))
    found = step(LAYERS, cluster, Horovod(cycle=0.0, bucket_bytes=math.inf, fp16=True, cast=1e-5))
    assert found.step == pytest.approx(0.8 + 0.2 + 0.04)


def test_synced_norm_waits_in_both_directions():
    cluster = Cluster(2, Link(1e-3, 1e12))
    horovod = Horovod(norm_request=0.01)
    plain = step(LAYERS, cluster, horovod)
    synced = step(LAYERS, cluster, horovod, sync_batch_norm=True)
    assert synced.forward - plain.forward == pytest.approx(0.012, rel=1e-3)
    assert synced.backward - plain.backward == pytest.approx(0.024, rel=1e-3)


@given(st.sampled_from([2, 8, 64, 4096]), st.booleans(), st.integers(0, 3000))
def test_no_step_is_shorter_than_one_rank_alone(ranks, sync, limit):
    cluster = Cluster(ranks, SLOW, 8, FAST, hierarchical=ranks > 8)
    found = step(LAYERS, cluster, Horovod(bucket_bytes=limit), sync, update=0.1)
    assert found.step >= compute(LAYERS, update=0.1) > 0
    assert math.isfinite(found.step)


def test_one_rank_sums_nothing():
    found = step(LAYERS, Cluster(1, SLOW), Horovod(), sync_batch_norm=True, update=0.1)
    assert found.step == pytest.approx(compute(LAYERS, update=0.1)) == pytest.approx(0.9)


def test_scaled_device_takes_so_many_times_as_long():
    assert compute(scaled(LAYERS, 0.5)) == pytest.approx(compute(LAYERS) / 2)
    assert [layer.gradient_bytes for layer in scaled(LAYERS, 0.5)] == [1000, 3000]

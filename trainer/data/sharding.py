"""Which samples make up which global batch, and which of them a rank takes. Pure NumPy.

Nothing here depends on the number of ranks but the last cut: the order of an epoch and its global
batches are functions of (size, global_batch_size, seed, epoch) alone.
"""

from __future__ import annotations

from typing import List

import numpy as np


def steps_per_epoch(size: int, global_batch_size: int) -> int:
    """Global batches in an epoch over ``size`` samples; the last one may be smaller."""
    return -(-size // global_batch_size)


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the samples: a permutation of range(size), int64."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)


def global_batch(order: np.ndarray, global_batch_size: int, batch: int) -> np.ndarray:
    """The samples of an epoch's ``batch``-th global batch, int64; the last may be shorter."""
    return order[batch * global_batch_size : (batch + 1) * global_batch_size]


def shard(indices: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The contiguous part of ``indices`` that ``rank`` takes; sizes differ by one at most.

    It is empty where there are fewer samples than ranks.
    """
    size = len(indices)
    return indices[rank * size // world_size : (rank + 1) * size // world_size]


def micro_shards(indices: np.ndarray, parts: int, rank: int, world_size: int) -> List[np.ndarray]:
    """What ``rank`` takes of each of ``parts`` contiguous micro-batches of a global batch.

    The micro-batches, and with them the statistics of synced batch norm, do not depend on the
    number of ranks. Ranks take turns at the larger shards, so that their totals stay even.
    """
    return [
        shard(shard(indices, part, parts), (rank + part) % world_size, world_size)
        for part in range(parts)
    ]


def uniform(seed: int, epoch: int, indices: np.ndarray, draws: int) -> np.ndarray:
    """Random numbers that belong to samples, whichever rank or batch they are in.

    Float64 in [0, 1), (len(indices), draws). Each is a hash of (seed, epoch, sample index, draw):
    the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014) applied twice.
    """
    # Python's integers do not overflow; the stream's key is brought to 64 bits by hand.
    key = np.uint64((seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF)
    samples = _mix(np.asarray(indices, np.uint64) ^ _mix(np.atleast_1d(key)))
    counters = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = _mix(samples[:, None] + counters[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of what a rank's device draws in a step (dropout), in [0, 2**31).

    Reseeding each step is what makes a resumed run exact: MXNet's random state cannot be saved.
    """
    return int(uniform(seed, step, np.array([rank]), 1)[0, 0] * 2**31)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

"""mixup and CutMix: every sample is mixed with another of the global batch, on any ranks alike."""

from __future__ import annotations

from typing import List, Tuple

import numpy as np
import pytest

from tests.transformed import Transform
from trainer.config import Data
from trainer.data import sharding
from trainer.data.augment import mixing
from trainer.data.loader import Batch, TrainLoader
from trainer.data.sources.base import ArraySource

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(0, 256, (23, 9, 7), np.uint8)
LABELS = RANDOM.randint(0, 10, 23)
SEED, BATCH, STEPS = 5, 8, 6  # two epochs: 8, 8 and 7 samples each


def batches(settings: Data, ranks: int, parts: int = 1) -> List[List[Batch]]:
    """Of each step, those of all ranks."""
    found = []
    for rank in range(ranks):
        loader = TrainLoader(
            ArraySource(IMAGES, LABELS),
            settings,
            global_batch_size=BATCH,
            seed=SEED,
            rank=rank,
            world_size=ranks,
            parts=parts,
        )
        found.append(list(loader.from_step(0, STEPS)))
    return [list(together) for together in zip(*found)]


def expected(settings: Data, step: int) -> Tuple[np.ndarray, np.ndarray]:
    """Pixels and soft labels, (N, 10), of a global batch, by masks on whole arrays."""
    epoch, number = divmod(step, 3)
    rows = sharding.global_batch(sharding.epoch_order(23, SEED, epoch), BATCH, number)
    plain = Transform(IMAGES, settings, SEED, training=True)(rows, epoch).astype(np.float64)
    mix = mixing.draw(settings.mixup, settings.cutmix, SEED, step, len(rows), 9, 7)
    kept = np.repeat(mix.shares.astype(np.float64), 9 * 7).reshape(-1, 9, 7)
    y, x = np.mgrid[:9, :7]
    for sample in np.flatnonzero(mix.cut):
        top, bottom, left, right = mix.boxes[sample]
        kept[sample] = ~((y >= top) & (y < bottom) & (x >= left) & (x < right))
    pixels = kept[:, None] * plain + (1 - kept[:, None]) * plain[mix.partners]
    share = kept.mean(axis=(1, 2))[:, None]  # of a cut sample, that of its pixels
    labels = np.eye(10)[LABELS[rows]]
    return pixels, share * labels + (1 - share) * labels[mix.partners]


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_a_global_batch_is_mixed_as_a_whole(ranks: int, alphas: Tuple[float, float]) -> None:
    settings = Data(pad_crop=1, flip=True, mixup=alphas[0], cutmix=alphas[1])
    for step, together in enumerate(batches(settings, ranks)):
        pixels, labels = expected(settings, step)
        own = [b for b in together if b.samples]
        found = np.concatenate([b.data[: b.samples] for b in own])
        soft = [
            b.mixed.share[:, None] * np.eye(10)[b.label.astype(int)]
            + (1 - b.mixed.share[:, None]) * np.eye(10)[b.mixed.label.astype(int)]
            for b in own
        ]
        np.testing.assert_allclose(found, pixels, atol=1e-6)
        np.testing.assert_allclose(np.concatenate(soft), labels, atol=1e-6)


def test_micro_batches_do_not_change_what_is_mixed() -> None:
    settings = Data(mixup=0.4, cutmix=1.0)
    for whole, parts in zip(batches(settings, 1), batches(settings, 1, parts=3)):
        np.testing.assert_array_equal(whole[0].data, parts[0].data)
        np.testing.assert_array_equal(whole[0].mixed.share, parts[0].mixed.share)


def test_shares_follow_the_beta_distribution() -> None:
    count = 20_000
    mix = mixing.draw(0.2, 0.0, 1, 2, count, 32, 32)
    assert not mix.cut.any() and sorted(mix.partners) == list(range(count))
    assert mix.shares.mean() == pytest.approx(0.5, abs=0.01)
    assert mix.shares.var() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.02)
    both = mixing.draw(0.2, 1.0, 1, 2, count, 32, 32)
    assert both.cut.mean() == pytest.approx(0.5, abs=0.01)
    top, bottom, left, right = both.boxes[both.cut].T
    areas = (bottom - top) * (right - left) / 32**2
    np.testing.assert_allclose(both.shares[both.cut], 1 - areas, rtol=1e-6)
    assert top.min() == 0 and bottom.max() == 32 and areas.max() > 0.9


def test_another_step_or_seed_draws_another_mix() -> None:
    first, again, step, seed = (
        mixing.draw(1.0, 1.0, *key, 50, 9, 7).partners.tolist()
        for key in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first == again and len({str(one) for one in (first, step, seed)}) == 3

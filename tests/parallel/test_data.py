"""Sets that are not in memory, read by ranks: alike, or refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Tuple

import mxnet as mx
import numpy as np
import pytest

from tests.unit.data.pictures import make_folder
from trainer import dist
from trainer.config import Data
from trainer.data import input_pipeline
from trainer.data.idx_file import DataError
from trainer.data.loader import TrainLoader
from trainer.data.sources.base import Source
from trainer.dist.array_memory import on_device
from trainer.run import agreement

RANKS = (2, 4)
COUNTS = (7, 5, 9)


class Noisy:
    """A dataset whose samples are drawn from every generator, and from one of its own."""

    def __init__(self) -> None:
        self.own = np.random.default_rng()

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        mxnets = float(mx.nd.random.uniform().asscalar())
        drawn = (random.random(), np.random.rand(), mxnets, self.own.random())
        return np.array([[[int(255 * number) for number in drawn]]], np.uint8), index % 3


def _batches(source: Source, settings: Data, rank: int, world_size: int) -> np.ndarray:
    """This rank's part of two epochs, in the rows that it has in each; zeros elsewhere."""
    loader = TrainLoader(
        source,
        settings,
        global_batch_size=8,
        seed=1,
        rank=rank,
        world_size=world_size,
        place=on_device(mx.cpu()),
    )
    steps = 2 * loader.steps_per_epoch
    found = np.zeros((steps, 8, *loader.shape))
    for step, batch in enumerate(loader.from_step(0, steps)):
        size = batch.global_samples
        start = rank * size // world_size
        found[step, start : start + batch.samples] = batch.data.asnumpy()[: batch.samples]
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "dataset"])
def test_ranks_see_what_one_sees(tmp_path: Path, kind: str, workers: int) -> None:
    if kind == "folder":
        make_folder(tmp_path, COUNTS)
        settings = Data(
            "folder",
            folder=str(tmp_path),
            image_size=16,
            random_crop=True,
            flip=True,
            color_jitter=0.4,
            workers=workers,
        )
        source = input_pipeline.read(settings).train
    else:
        settings = Data("arrays", flip=True, workers=workers)
        source = input_pipeline.read(settings, Noisy()).train
    together = dist.allreduce_sum(
        _batches(source, settings, dist.rank(), dist.world_size()), "test.batches"
    )
    np.testing.assert_array_equal(together, _batches(source, settings, 0, 1))
    source.close()


def test_a_folder_that_lacks_a_picture_on_one_rank_is_refused_on_all(tmp_path: Path) -> None:
    made = make_folder(tmp_path, COUNTS)
    settings = Data("folder", folder=str(tmp_path), image_size=16)

    def check() -> None:
        sets = input_pipeline.read(settings)
        agreement.check_sets(agreement.of_data(sets), sets.sizes)

    check()
    if dist.rank() == 1:
        made[-1].rename(made[-1].with_name("99.png"))
    with pytest.raises(DataError, match=r"different training images: 21 training images on rank 0"):
        check()

"""This rank's share of the training and of the test set, put on its device."""

from __future__ import annotations

from typing import Tuple

import mxnet as mx
import numpy as np

from . import dist
from .config import Config
from .loader import EvalLoader, TrainLoader
from .placement import on_device

Arrays = Tuple[np.ndarray, np.ndarray]  # images uint8 (N, H, W), labels integer (N,)


def train_loader(train: Arrays, config: Config, ctx: mx.Context) -> TrainLoader:
    """Its share of every global batch."""
    return TrainLoader(
        *train,
        config.data,
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
        rank=dist.rank(),
        world_size=dist.world_size(),
        place=on_device(ctx),
    )


def test_loader(test: Arrays, config: Config, ctx: mx.Context) -> EvalLoader:
    """Its share of the test set."""
    return EvalLoader(
        *test,
        config.data,
        batch_size=config.evaluate.batch_size,
        rank=dist.rank(),
        world_size=dist.world_size(),
        place=on_device(ctx),
    )

"""A trained model taken from its checkpoint: looked at on the test set, or calibrated."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional, Sequence, Tuple

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import batch_norm, checkpoint, config, dist, fashion_mnist, feed, model, replica
from .config import Config
from .device import choose
from .evaluation import evaluate
from .loader import Transform
from .metrics import Evaluation


class Saved(NamedTuple):
    """A net on its device, with the weights of a checkpoint."""

    path: Path
    config: Config
    net: gluon.Block
    ctx: mx.Context
    test: Tuple[np.ndarray, np.ndarray]  # images uint8 (N, H, W), labels int32 (N,)
    num_classes: int


def load(where: str, overrides: Sequence[str] = ()) -> Saved:
    """The model at ``where``: a checkpoint, or a run's folder (its best checkpoint); collective.

    Args:
        overrides: settings in place of those that the checkpoint was made with.

    Raises:
        CheckpointError: there is no whole checkpoint, or it does not fit the net.
    """
    dist.init()
    with dist.together():
        path = _find(Path(where))
        settings = config.from_dict(checkpoint.read_state(path)["config"], overrides)
        ctx = choose(settings.device, dist.local_rank())
        net = model.build(settings.model)
        test = fashion_mnist.load("test", settings.data.folder, settings.data.dataset)
        shape = Transform(test[0], settings.data, seed=0, training=False).shape
        replica.prepare(net, settings, shape, ctx)
        classes = replica.class_scores(net, shape, ctx, 1 + int(test[1].max()))
        checkpoint.load_parameters(path, net)
    return Saved(path, settings, net, ctx, test, classes)


def _find(where: Path) -> Path:
    path: Optional[Path] = where
    if (where / "checkpoints").is_dir():
        path = checkpoint.find_best(where / "checkpoints")
        path = path or next(iter(reversed(checkpoint.listing(where / "checkpoints"))), None)
    if path is None:
        raise checkpoint.CheckpointError(f"{where} holds no checkpoint yet")
    wrong = checkpoint.problem(path)
    if wrong is not None:
        raise checkpoint.CheckpointError(f"{wrong}; give a run's folder or a whole checkpoint")
    return path


def evaluate_saved(saved: Saved) -> Evaluation:
    """The model on the whole test set; collective."""
    batches = feed.test_loader(saved.test, saved.config, saved.ctx)
    return evaluate(saved.net, batches, saved.num_classes)


def calibrate_saved(saved: Saved, samples: Optional[int]) -> None:
    """Measure the running statistics anew over ``samples`` of the training set; collective.

    None takes all of it. The samples are augmented as in training.
    """
    settings = saved.config
    train = fashion_mnist.load("train", settings.data.folder, settings.data.dataset)
    loader = feed.train_loader(train, settings, saved.ctx)
    steps = loader.steps_per_epoch
    if samples is not None:
        steps = min(steps, -(-samples // settings.train.global_batch_size))
    # The epoch after the last: an order of its own.
    first = settings.train.epochs * loader.steps_per_epoch
    batches = loader.from_step(first, first + steps)
    batch_norm.calibrate(saved.net, ((batch.data, batch.samples) for batch in batches))

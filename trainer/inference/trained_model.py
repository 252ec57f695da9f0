"""Loads a trained model from its checkpoint, evaluates it and recalibrates its batch norm.

See also ``predict.py`` and ``export.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import checkpoint, config, dist, model
from ..batch_norm import running_statistics
from ..checkpoint import params_file
from ..config import Config
from ..data import arrays, fashion_mnist, input_pipeline
from ..data.arrays import Arrays
from ..data.idx_file import DataError
from ..data.transform import Transform
from ..dist.device import choose
from ..model import prepare
from ..step.evaluation import Evaluation, evaluate


class Saved(NamedTuple):
    """A net on its device, with the weights of a checkpoint."""

    path: Path
    config: Config
    net: gluon.Block
    ctx: mx.Context
    image_shape: Tuple[int, ...]  # of the dataset, before any resizing: (H, W) or (H, W, C)
    num_classes: int

    @property
    def class_names(self) -> List[str]:
        """A name for each class; its number where the dataset names none."""
        return fashion_mnist.class_names(self.config.data.dataset, self.num_classes)

    @property
    def on_given_images(self) -> bool:
        """Whether it was trained on images passed to ``fit``, which are not kept."""
        return self.config.data.dataset == "arrays"

    @property
    def pixels(self) -> str:
        """What its images look like, for users who prepare their own."""
        channels = "".join(f"{count} channels" for count in self.image_shape[2:]) or "grey"
        fashion = self.config.data.dataset.startswith("fashion_mnist")
        return f"{channels}, light on dark" if fashion else channels


def load(where: str, overrides: Sequence[str] = ()) -> Saved:
    """Load the model at ``where``, a checkpoint or a run's folder (its best one); collective.

    Args:
        overrides: ``setting=value``, replacing settings of the checkpoint.

    Raises:
        CheckpointError: there is no valid checkpoint, or it does not fit the net.
    """
    dist.init()
    with dist.together():
        path = _find(Path(where))
        state = checkpoint.read_state(path)
        settings = config.from_dict(config.recorded(state.config), overrides)
        ctx = choose(settings.device, dist.local_rank())
        net = model.build(settings.model)
        image_shape = tuple(state.image_shape or input_pipeline.image_size(settings.data))
        sample = np.zeros((1, *image_shape), np.uint8)
        shape = Transform(sample, settings.data, 0, training=False).shape
        prepare.prepare_net(net, settings, shape, ctx)
        classes = prepare.class_scores(net, shape, ctx, classes=1)
        checkpoint.load_parameters(path, net)
    return Saved(path, settings, net, ctx, image_shape, classes)


def test_set(saved: Saved, given: Optional[Arrays] = None) -> Arrays:
    """``given``, or the test set that the config names.

    Images are uint8 (N, H, W[, C]), labels integer (N,).

    Raises:
        DataError: it cannot be found, or does not fit the net.
    """
    images, labels = _read(saved, "test", given)
    if labels.max() >= saved.num_classes:
        raise DataError(
            f"the test set has {1 + labels.max()} classes, the net of {saved.path} "
            f"{saved.num_classes}; give the set it was trained on (data.dataset, data.folder)"
        )
    return images, labels


def _read(saved: Saved, split: str, given: Optional[Arrays]) -> Arrays:
    if given is not None:
        images, labels = arrays.checked(split, given)
    elif saved.on_given_images:
        raise DataError(
            f"{saved.path} was trained on images given to fit(), which are not kept; give them "
            "again in Python: from trainer import saved; saved.evaluate_saved(saved.load("
            f"{str(saved.path)!r}), test=(images, labels)); calibrate_saved takes train=..."
        )
    else:
        images, labels = fashion_mnist.load(split, *_source(saved.config.data))
    if images.shape[3:] != saved.image_shape[2:]:
        raise DataError(
            f"the {split} set has images of {images.shape[1:]}, the net of {saved.path} takes "
            f"{saved.image_shape} (height, width[, channels]); give the set it was trained on"
        )
    return images, labels


def _source(data: config.Data) -> Tuple[Optional[str], str]:
    return data.folder, data.dataset


def _find(where: Path) -> Path:
    if not where.is_dir():
        raise checkpoint.CheckpointError(
            f"there is no folder {where}; give a run's folder or a whole checkpoint"
        )
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


def evaluate_saved(saved: Saved, test: Optional[Arrays] = None) -> Evaluation:
    """Evaluate the model on the whole test set; collective.

    Args:
        test: replaces the set that the config names; the same on every rank.
    """
    with dist.together():
        test = test_set(saved, test)
    batches = input_pipeline.test_loader(test, saved.config, saved.ctx)
    return evaluate(saved.net, batches, saved.num_classes)


def scores(saved: Saved, images: np.ndarray) -> np.ndarray:
    """Logits, float32 (N, K), of ``images``, uint8 (N, H, W[, C]); in a single process.

    Images are resized and normalised as in training.
    """
    labels = np.zeros(len(images), np.int32)
    batches = input_pipeline.test_loader((images, labels), saved.config, saved.ctx)
    return np.concatenate([saved.net(batch.data).asnumpy() for batch in batches])


def calibrate_saved(
    saved: Saved, samples: Optional[int] = None, train: Optional[Arrays] = None
) -> None:
    """Recompute the running statistics on the training set, augmented; collective.

    Args:
        samples: how many samples to use, rounded up to global batches; None uses all.
        train: replaces the set that the config names; the same on every rank.
    """
    settings = saved.config
    prepare.check_calibration(saved.net)
    train = _read(saved, "train", train)
    loader = input_pipeline.train_loader(train, settings, saved.ctx)
    steps = loader.steps_per_epoch
    if samples is not None:
        steps = min(steps, -(-samples // settings.train.global_batch_size))
    # The epoch after the last, which has its own order.
    first = settings.train.epochs * loader.steps_per_epoch
    batches = loader.from_step(first, first + steps)
    running_statistics.calibrate(saved.net, ((batch.data, batch.samples) for batch in batches))


def write_parameters(saved: Saved, path: Path) -> None:
    """Write the model's parameters to ``path``, for ``net.load_parameters``.

    Raises:
        OSError: the disk is full, ...
    """
    with params_file.whole(path):
        saved.net.save_parameters(str(path))

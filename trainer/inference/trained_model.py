"""Loads a trained model from its checkpoint, evaluates it and recalibrates its batch norm.

See also ``predict.py`` and ``export.py``.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import checkpoint, config, dist, model
from ..batch_norm import running_statistics
from ..config import Config
from ..data import input_pipeline
from ..data.arrays import Arrays
from ..data.classes import Classes
from ..data.classes import names as class_names
from ..data.idx_file import DataError
from ..data.sources.base import ArraySource, Source
from ..data.transform import PixelTransform, planes_shape
from ..dist.device import choose
from ..model import prepare
from ..step.evaluation import Evaluation, built_in, evaluate

_NAMES_A_NET = re.compile(r"\s*model(\.factory)?\s*=")  # an override


class Saved(NamedTuple):
    """A net on its device, with the weights of a checkpoint."""

    path: Path
    config: Config
    net: gluon.Block
    ctx: mx.Context
    image_shape: Tuple[int, ...]  # of the dataset, before any resizing: (H, W) or (H, W, C)
    class_names: List[str]  # one for each score
    classes: Classes  # what the set calls classes 0, 1, ...; None for these numbers
    accuracy: Optional[float] = None  # as recorded with the checkpoint
    validation: Optional[str] = None  # the digest of the images of its run's validation set, if any
    weights: Optional[Path] = None  # the file they are of instead, such as calibrate writes
    own_set: bool = True  # the config names the set of its run, and divides it as that did

    @property
    def chosen_on(self) -> str:
        """The set of the recorded accuracy: test or validation."""
        return "validation" if self.validation else "test"

    @property
    def source(self) -> Path:
        """What its weights were read from."""
        return self.weights or self.path

    @property
    def num_classes(self) -> int:
        """Scores of the net."""
        return len(self.class_names)

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


def load(
    where: str,
    overrides: Sequence[str] = (),
    net: Optional[gluon.Block] = None,
    params: Optional[str] = None,
    trust: bool = False,
) -> Saved:
    """Load the model at ``where``, a checkpoint or a run's folder (its best one); collective.

    CheckpointError says that there is no valid checkpoint, or of this net, or that weights are not
    finite; ConfigError that its net cannot be made, or would run what nobody has named.

    Args:
        overrides: ``setting=value``, replacing settings of the checkpoint.
        net: the net that was given to ``fit``; None for what ``model.factory`` makes.
        params: a file of weights for the same net, which replace the checkpoint's.
        trust: run any function that the checkpoint names as its ``model.factory``; otherwise one
            that is not the project's own must be among ``overrides``.
    """
    dist.init()
    with dist.together():
        path = checkpoint.find(where)
        state = checkpoint.read_state(path)
        recorded = config.from_dict(state.config)
        settings = config.from_dict(state.config, overrides)
        ctx = choose(settings.device, dist.local_rank())
        named = trust or any(_NAMES_A_NET.match(text) for text in overrides)
        if net is None:
            net = model.build(settings.model, None if named else path, recorded.seed)
        image_shape = tuple(state.image_shape or input_pipeline.image_size(settings.data))
        shape = _input_shape(image_shape, settings)
        prepare.prepare_net(net, settings, shape, ctx)
        count = prepare.class_scores(net, shape, ctx, classes=1).shape[1]
        checkpoint.load_parameters(path, net)
        if shape == _input_shape(image_shape, recorded):
            way_out = (
                "the net was given to fit(): give it again, in Python, "
                f"trainer.inference.trained_model.load({str(path)!r}, net=net)"
                if state.given
                else "its code has changed since: use the one it was trained with"
            )
            checkpoint.check_answers(path, state, prepare.answers(net, shape, ctx), way_out)
        weights = None if params is None else Path(params)
        if weights is not None:
            checkpoint.load_parameters(weights, net)
        _check_weights(weights or path, net)
        classes = None if state.classes is None else tuple(state.classes)
        given, kept = settings.data, recorded.data
        own_names = state.class_names if given.class_names == kept.class_names else None
        names = list(own_names or class_names(given, classes, count))
    accuracy, split = None if weights else state.accuracy, state.made_of.get("validation images")
    drawn = [
        (c.data.dataset, c.data.folder, c.data.validation, c.seed) for c in (settings, recorded)
    ]
    own_set = drawn[0] == drawn[1]
    made = settings, net, ctx, image_shape, names, classes
    return Saved(path, *made, accuracy, split, weights, own_set)


def _check_weights(source: Path, net: gluon.Block) -> None:
    """Refuse weights that are not finite, which oneDNN's ReLU hides: it makes 0 of NaN.

    Running statistics may be: ``calibrate`` mends them.
    """
    statistics = {id(parameter) for parameter in running_statistics.parameters(net)}
    for name, parameter in net.collect_params().items():
        if isinstance(parameter, gluon.Constant):  # attention's mask may hold -inf
            continue
        if id(parameter) not in statistics and not np.isfinite(parameter.data().asnumpy()).all():
            raise checkpoint.CheckpointError(
                f"{source} holds weights that are not finite, of {name}; take another checkpoint"
            )


def _input_shape(image_shape: Tuple[int, ...], settings: Config) -> Tuple[int, int, int]:
    return PixelTransform(planes_shape(image_shape), settings.data, 0, training=False).shape


def test_set(saved: Saved, given: Any = None) -> Source:
    """``given``, or the test set that the config names, or else its validation set.

    ``given`` is arrays or a dataset, as for ``fit``. DataError says why the set cannot be found, or
    does not fit the net.
    """
    source = find_test_set(saved, given)
    if source is None:
        raise DataError(
            f"{saved.config.data.folder} holds no test set, as FOLDER/test/ or FOLDER/test.rec is, "
            "nor just what its run was validated on; name a folder that does, data.folder=FOLDER"
        )
    return source


def find_test_set(saved: Saved, given: Any = None, name: str = "test") -> Optional[Source]:
    """The same, or the training set if ``name`` is ``train``; None where there is neither set."""
    if given is None and saved.on_given_images:
        trust = "" if saved.config.model.factory == model.OWN else ", trust=True"
        raise DataError(
            f"{saved.path} was trained on images given to fit(), which are not kept; give them "
            "again in Python: from trainer.inference.trained_model import evaluate_saved, load; "
            f"evaluate_saved(load({str(saved.path)!r}{trust}), test=(images, labels)); "
            "calibrate_saved takes train=..."
        )
    data, seed, classes = saved.config.data, saved.config.seed, saved.classes
    if given is None and data.dataset == "folder" and not isinstance((classes or [0])[0], str):
        classes = tuple(saved.class_names)  # folders have names; the net's own set had numbers
    own = None if saved.own_set else saved.validation or ""
    source = input_pipeline.read_one(name, data, classes, given, seed, own)
    if source is None:
        return None
    with contextlib.ExitStack() as unless_it_fits:
        unless_it_fits.callback(source.close)
        _check_channels(saved, source.image_shape, f"the {name} set has images of")
        highest = -1 if source.labels is None else int(source.labels.max())
        if highest >= saved.num_classes:
            raise DataError(
                f"the {name} set has {1 + highest} classes, the net of {saved.path} "
                f"{saved.num_classes}; give the set it was trained on (data.dataset, data.folder)"
            )
        source.expect(saved.num_classes)
        unless_it_fits.pop_all()
    return source


def _check_channels(saved: Saved, shape: Tuple[int, ...], which: str) -> None:
    if shape[2:] != saved.image_shape[2:]:
        raise DataError(
            f"{which} {shape}, the net of {saved.path} takes {saved.image_shape} (height, width[, "
            "channels]); give such as it was trained on (data.channels, data.dataset, data.folder)"
        )


def evaluate_saved(
    saved: Saved, test: Union[Arrays, Source, None] = None, finite: bool = True
) -> Evaluation:
    """Evaluate the model on the whole test set, or on ``test``, alike on every rank; collective.

    Scores that are not finite are refused, by CheckpointError, if ``finite``.
    """
    settings = saved.config.evaluate
    metrics = built_in(settings, saved.num_classes)
    with contextlib.ExitStack() as until_seen:
        with dist.together():
            source = test if isinstance(test, Source) else test_set(saved, test)
        if source is not test:
            until_seen.callback(source.close)
        batches = input_pipeline.test_loader(source, saved.config, saved.ctx)
        seen = evaluate(saved.net, batches, saved.num_classes, metrics=metrics, flip=settings.flip)
    if finite:
        check_finite(saved, seen.loss)
    return seen


def check_finite(saved: Saved, scores: Union[np.ndarray, float]) -> None:
    """Refuse a model by its ``scores``, or its loss, unless finite: by CheckpointError."""
    if not np.isfinite(scores).all():
        raise checkpoint.CheckpointError(
            f"the scores by {saved.source} are not finite: its running statistics or the net's "
            "arithmetic are broken; take another checkpoint, or calibrate it"
        )


def scores(saved: Saved, images: np.ndarray) -> np.ndarray:
    """Logits, float32 (N, K), of ``images``, uint8 (N, H, W[, C]); in a single process.

    Images are resized and normalised as in training. Scores that are not finite are refused, by
    CheckpointError; images of other channels by DataError.
    """
    _check_channels(saved, images.shape[1:], "the images are read as")
    source = ArraySource(images, np.zeros(len(images), np.int32))
    batches = input_pipeline.test_loader(source, saved.config, saved.ctx)
    found = np.concatenate([saved.net(batch.data).asnumpy() for batch in batches])
    check_finite(saved, found)
    return found


def calibrate_saved(
    saved: Saved, samples: Optional[int] = None, train: Optional[Arrays] = None
) -> None:
    """Recompute the running statistics on the training set, augmented; collective.

    Of ``samples`` of it, rounded up to global batches; None uses all. ``train`` replaces the set
    that the config names, alike on every rank.
    """
    settings = saved.config
    prepare.check_calibration(saved.net)
    source = find_test_set(saved, train, "train")
    assert source is not None  # only a test set may be missing
    loader = input_pipeline.train_loader(source, settings, saved.ctx)
    steps = loader.steps_per_epoch
    if samples is not None:
        steps = min(steps, -(-samples // settings.train.global_batch_size))
    # The epoch after the last, which has its own order.
    first = settings.train.epochs * loader.steps_per_epoch
    batches = loader.from_step(first, first + steps)
    with contextlib.closing(source):
        running_statistics.calibrate(saved.net, ((batch.data, batch.samples) for batch in batches))

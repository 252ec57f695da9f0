"""From settings to the training and test set, and to this rank's loaders of them."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple, Union

import mxnet as mx
import numpy as np

from .. import console, dist
from ..config import Config, Data
from ..dist import environment
from ..dist.array_memory import on_device
from . import arrays, fashion_mnist
from .arrays import Arrays
from .classes import Classes, numbered, of_labels
from .idx_file import BadSampleError, DataError
from .loader import EvalLoader, TrainLoader
from .sources import folder, records
from .sources.base import ArraySource, Source, probes
from .sources.dataset import DatasetSource
from .transform import as_images


class Sets(NamedTuple):
    """The sets of a run."""

    train: Source
    validation: Optional[Source]  # None where there is none: then the test set chooses
    test: Optional[Source]

    @property
    def watched(self) -> Optional[Source]:
        """What is evaluated after each epoch, chooses the best checkpoint and stops early."""
        return self.test if self.validation is None else self.validation

    @property
    def named(self) -> Dict[str, Source]:
        """Those that there are, as ``training``, ``validation`` and ``test``."""
        names = ("training", "validation", "test")
        return {name: source for name, source in zip(names, self) if source is not None}

    @property
    def sizes(self) -> Dict[str, int]:
        """The number of images in each that there is."""
        return {name: len(source) for name, source in self.named.items()}

    @property
    def num_classes(self) -> int:
        """As many as a net must tell apart, as far as is known without reading samples."""
        sources = self.named.values()
        named = [len(source.classes) for source in sources if source.classes is not None]
        highest = [int(s.labels.max()) + 1 for s in sources if s.labels is not None]
        return max([1, *named, *highest])

    def expect(self, num_classes: int) -> None:
        """Tell the scores of the net, to which labels are held that are read later."""
        for source in self.named.values():
            source.expect(num_classes)

    def close(self) -> None:
        """Stop their threads and processes."""
        for source in self.named.values():
            source.close()


_FIND = {"folder": folder.find, "records": records.find}  # sets of pictures
_Given = Union[Arrays, DatasetSource]
_LOOKED_AT = 1000  # images in memory at most, for the range of their pixels
_STREAM = 2**64 - 1  # of random numbers: no epoch has this number
FROM_THE_SET = "from the set"  # classes are numbered as the training set has them


def read(
    settings: Data,
    train: Any = None,
    test: Any = None,
    seed: int = 0,
    validation: Any = None,
    *,
    known: Union[Classes, str] = FROM_THE_SET,
) -> Sets:
    """The sets of a run: those given, or that ``settings`` name; DataError where one is invalid.

    Args:
        train, validation, test: arrays or a dataset, see :func:`arrays.given`; the last two may be
            missing.
        seed: of the run; a validation split is drawn from it.
        known: the classes of a trained net.
    """
    every = {"train": train, "validation": validation, "test": test}
    given = {name: part for name, part in every.items() if part is not None}
    if given and train is None:
        first = next(iter(given))
        raise DataError(f"{first}=... is given without train=...; give both, or neither")
    classes = None if isinstance(known, str) else known
    found: Mapping[str, _Given]
    if train is None and settings.of_pictures:
        sources = _FIND[settings.dataset](settings, classes)
    else:
        if train is None:
            where = settings.folder, settings.dataset
            found = {k: fashion_mnist.load(k, *where) for k in fashion_mnist.splits(*where)}
        else:
            found = {name: arrays.given(name, part, settings) for name, part in given.items()}
        if isinstance(known, str) and isinstance(found["train"], tuple):
            classes = of_labels(*(part[1] for part in found.values() if isinstance(part, tuple)))
            if classes and environment.rank() == 0 and classes[0] == 1:
                console.warn(f"labels are 1 to {classes[-1]}: score 0 of the net is label 1, etc.")
        sources = in_memory(found, classes)
    if settings.validation and "validation" in sources:
        holds = "validation=... is" if given else f"folder {settings.folder} holds"
        raise DataError(f"{holds} a validation set of its own; set data.validation=0")
    if settings.validation:
        sources.update(_divided(sources["train"], settings.validation, seed))
    return Sets(sources["train"], sources.get("validation"), sources.get("test"))


def _divided(train: Source, share: float, seed: int) -> Dict[str, Source]:
    """The parts of a training set that are trained on and kept out, as ``train`` and the other."""
    names, parts = ("train", "validation"), split(len(train), train.all_labels(), share, seed)
    return {name: train.subset(indices) for name, indices in zip(names, parts)}


def read_one(
    name: str,
    settings: Data,
    classes: Classes,
    given: Any = None,
    seed: int = 0,
    own: Optional[str] = None,
) -> Optional[Source]:
    """The ``train`` or the ``test`` set of a trained net; for a test set that is missing, the
    validation set. None without both. A test set may stand alone.

    Args:
        classes: those of the net; ``given`` and ``seed`` are as for :func:`read`.
        own: where ``settings`` name another set than the run's: the digest of the images of its
            validation set. Only this one is drawn from a training set.
    """
    if name == "train":
        return read(settings, given, seed=seed, known=classes).train
    if given is not None:
        return in_memory({name: arrays.given(name, given, settings)}, classes)[name]
    if settings.of_pictures:
        sources = _FIND[settings.dataset](settings, classes, needs_train=False)
    else:
        last = fashion_mnist.splits(settings.folder, settings.dataset)[-1]
        found = fashion_mnist.load(last, settings.folder, settings.dataset)
        sources = in_memory({last: found}, classes)
    if name in sources:
        return sources[name]
    if settings.validation and "validation" not in sources:
        sources.update(_divided(sources["train"], settings.validation, seed))
        if own not in (None, sources["validation"].images_digest()):
            return None
    validation = sources.get("validation")
    if validation is not None:
        validation.called = "validation"
    return validation


def in_memory(found: Mapping[str, _Given], classes: Classes) -> Dict[str, Source]:
    """Sources by name, whose labels are ``classes``; arrays become sources."""
    sources: Dict[str, Source] = {}
    for name, part in found.items():
        if isinstance(part, tuple):
            sources[name] = ArraySource(part[0], numbered(name, part[1], classes), classes)
        else:
            part.classes, sources[name] = classes, part
    return sources


def check_shapes(sets: Sets, settings: Data) -> None:
    """Refuse sets that differ in channels, or, without ``data.image_size``, in height or width."""
    train = sets.train.image_shape
    for name, source in sets.named.items():
        other = source.image_shape
        if train[:2] != other[:2] and settings.image_size is None:
            raise DataError(
                f"training images are {train[:2]}, {name} images {other[:2]} (height, width); set "
                "data.image_size"
            )
        if train[2:] != other[2:]:
            raise DataError(
                f"training images are {train}, {name} images {other}; they must have the same "
                "channels: (height, width, channels), or (height, width) of one"
            )


def tell_of_ranges(sets: Sets, settings: Data) -> None:
    """Warn of pixels that use a corner of 0 to 255, by a look at some of each set's samples.

    And of datasets that draw from what is not seeded; and of a validation split whose samples are
    drawn anew, by the training set's transforms.
    """
    kept_out = sets.validation if settings.validation else None
    for name, source in sets.named.items():
        if isinstance(source, ArraySource):
            arrays.tell_of_range(name, source.images[:: -(-len(source) // _LOOKED_AT)])
            continue
        with contextlib.suppress(BadSampleError):  # told of when it is trained on
            first = _probed(source, settings)
            arrays.tell_of_range(name, as_images(first, settings))
            if not isinstance(source, DatasetSource):
                continue
            if (_probed(source, settings) != first).any():
                console.warn(
                    f"{name} samples are others when they are read again: their dataset draws from "
                    "what fit cannot seed, so that the run depends on data.workers and is not "
                    "resumed exactly; draw from numpy.random, or a generator that the dataset holds"
                )
            elif source is kept_out and (_probed(source, settings, epoch=1) != first).any():
                console.warn(
                    "data.validation is measured through the training set's transforms, which are "
                    "random: give validation= a set without such, and set data.validation=0"
                )


def _probed(source: Source, settings: Data, epoch: int = 0) -> np.ndarray:
    """A few samples as they are drawn in an epoch, float32 (B, channels, height, width)."""
    filler = source.filler(replace(settings, bad_samples="stop"), 0, training=False)
    rows = probes(len(source))
    data = np.empty((len(rows), *filler.shape), np.float32)
    filler(rows, epoch, data, np.empty(len(rows), np.float32))
    return data


def image_size(settings: Data) -> Tuple[int, int]:
    """(height, width) of the images that ``settings`` name, before any resizing."""
    if settings.dataset != "idx":
        return 28, 28  # Fashion-MNIST's
    last = fashion_mnist.splits(settings.folder, settings.dataset)[-1]  # the smaller one
    height, width = fashion_mnist.load(last, settings.folder, settings.dataset)[0].shape[1:]
    return height, width


def train_loader(train: Source, config: Config, ctx: mx.Context) -> TrainLoader:
    """This rank's loader of training batches."""
    ranks, size = (dist.rank(), dist.world_size()), config.train.global_batch_size
    parts, place = config.optimizer.accumulate, on_device(ctx)
    return TrainLoader(train, config.data, size, config.seed, *ranks, parts=parts, place=place)


def test_loader(test: Source, config: Config, ctx: mx.Context) -> EvalLoader:
    """This rank's loader of a set that is evaluated."""
    ranks, size = (dist.rank(), dist.world_size()), config.evaluate.batch_size
    return EvalLoader(test, config.data, size, *ranks, place=on_device(ctx))


def split(
    size: int, labels: Optional[np.ndarray], share: float, seed: int
) -> Tuple[np.ndarray, np.ndarray]:
    """The samples to train on, and those to validate on; each sorted, int64.

    The same share of each class is drawn from the seed; at least one sample of it, and never all.
    ``labels`` is integer (size,), or None where they are not known: then the samples count as one
    class. Raises DataError where nothing would remain of a part.
    """
    draw = np.random.Generator(np.random.Philox(key=[seed, _STREAM]))
    shuffled = draw.permutation(size)
    kept_out = np.zeros(size, bool)
    of_class = np.zeros(size, np.int64) if labels is None else labels[shuffled]
    for label in np.unique(of_class):
        members = shuffled[of_class == label]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        kept_out[members[:count]] = True
    train, validation = np.flatnonzero(~kept_out), np.flatnonzero(kept_out)
    if not len(train) or not len(validation):
        raise DataError(
            f"data.validation is {share:g}, and no class of the training set has two images"
        )
    return train, validation

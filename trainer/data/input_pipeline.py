"""From settings to the training and test set, and to this rank's loaders of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple, Union

import mxnet as mx
import numpy as np

from .. import dist
from ..config import Config, Data
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
    """The sets of a run: the given ones, or those that ``settings`` name.

    Args:
        train, validation, test: arrays or a dataset, see :func:`arrays.given`; the last two may be
            missing.
        seed: of the run; a validation split is drawn from it.
        known: the classes of a trained net.

    Raises:
        DataError: they cannot be found or are invalid.
    """
    every = {"train": train, "validation": validation, "test": test}
    given = {name: part for name, part in every.items() if part is not None}
    if given and train is None:
        first = next(iter(given))
        raise DataError(f"{first}=... is given without train=...; give both, or neither")
    classes = None if isinstance(known, str) else known
    training: Optional[Source]
    choosing: Optional[Source]
    testing: Optional[Source]
    found: Mapping[str, Union[Arrays, DatasetSource]]
    if train is None and settings.of_pictures:
        training, choosing, testing = _find_pictures(settings, classes)
        assert training is not None  # it is needed
    else:
        if train is None:
            found = {
                k: fashion_mnist.load(k, settings.folder, settings.dataset)
                for k in fashion_mnist.splits(settings.folder, settings.dataset)
            }
        else:
            found = {name: arrays.given(name, part, settings) for name, part in given.items()}
        if isinstance(known, str) and isinstance(found["train"], tuple):
            classes = of_labels(*(part[1] for part in found.values() if isinstance(part, tuple)))
        sources = in_memory(found, classes)
        training = sources["train"]
        choosing, testing = sources.get("validation"), sources.get("test")
    if settings.validation and choosing is not None:
        holds = "validation=... is" if given else f"folder {settings.folder} holds"
        raise DataError(f"{holds} a validation set of its own; set data.validation=0")
    if settings.validation:
        chosen = split(len(training), training.all_labels(), settings.validation, seed)
        training, choosing = (training.subset(indices) for indices in chosen)
    return Sets(training, choosing, testing)


def read_one(
    name: str, settings: Data, classes: Classes, given: Any = None, seed: int = 0
) -> Optional[Source]:
    """The ``train`` or the ``test`` set of a trained net; for a test set that is missing, the
    validation set. None without both. A test set may stand alone.

    Args:
        classes: those of the net.
        given, seed: as for :func:`read`.
    """
    of_idx = not settings.of_pictures and given is None
    if (
        name == "test"
        and of_idx
        and name in fashion_mnist.splits(settings.folder, settings.dataset)
    ):
        given = fashion_mnist.load(name, settings.folder, settings.dataset)
    if name == "test" and given is not None:
        return in_memory({name: arrays.given(name, given, settings)}, classes)[name]
    if name == "test" and settings.of_pictures and not settings.validation:
        train, validation, test = _find_pictures(settings, classes, needs_train=False)
    else:
        train, validation, test = read(settings, given, seed=seed, known=classes)
    if name == "train" or test is not None:
        return train if name == "train" else test
    if validation is not None:
        validation.called = "validation"
    return validation


def _find_pictures(
    settings: Data, known: Classes, needs_train: bool = True
) -> Tuple[Optional[Source], Optional[Source], Optional[Source]]:
    find = folder.find if settings.dataset == "folder" else records.find
    return find(settings, known, needs_train)


def in_memory(
    found: Mapping[str, Union[Arrays, DatasetSource]], classes: Classes
) -> Dict[str, Source]:
    """Sources by name, whose labels are ``classes``; arrays become sources."""
    sources: Dict[str, Source] = {}
    for name, part in found.items():
        if isinstance(part, tuple):
            sources[name] = ArraySource(part[0], numbered(name, part[1], classes), classes)
        else:
            part.classes, sources[name] = classes, part
    return sources


def check_shapes(sets: Sets, settings: Data) -> None:
    """Refuse sets whose images a net cannot take both.

    Raises:
        DataError: they differ in size, without ``data.image_size``, or in channels.
    """
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
    """Warn of pixels that use a corner of 0 to 255, by a look at some of each set's samples."""
    unread = replace(settings, bad_samples="stop")  # those are told of when they are trained on
    for name, source in sets.named.items():
        if isinstance(source, ArraySource):
            some = source.images[:: -(-len(source) // _LOOKED_AT)]
        else:
            filler, rows = source.filler(unread, 0, training=False), np.array(probes(len(source)))
            data = np.empty((len(rows), *filler.shape), np.float32)
            try:
                filler(rows, 0, data, np.empty(len(rows), np.float32))
            except BadSampleError:
                continue
            some = as_images(data, settings)
        arrays.tell_of_range(name, some)


def image_size(settings: Data) -> Tuple[int, int]:
    """(height, width) of the images that ``settings`` name, before any resizing."""
    if settings.dataset != "idx":
        return fashion_mnist.IMAGE_SIZE
    last = fashion_mnist.splits(settings.folder, settings.dataset)[-1]  # the smaller one
    height, width = fashion_mnist.load(last, settings.folder, settings.dataset)[0].shape[1:]
    return height, width


def train_loader(train: Source, config: Config, ctx: mx.Context) -> TrainLoader:
    """This rank's loader of training batches."""
    return TrainLoader(
        train,
        config.data,
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
        rank=dist.rank(),
        world_size=dist.world_size(),
        parts=config.optimizer.accumulate,
        place=on_device(ctx),
    )


def test_loader(test: Source, config: Config, ctx: mx.Context) -> EvalLoader:
    """This rank's loader of a set that is evaluated."""
    return EvalLoader(
        test,
        config.data,
        batch_size=config.evaluate.batch_size,
        rank=dist.rank(),
        world_size=dist.world_size(),
        place=on_device(ctx),
    )


def split(
    size: int, labels: Optional[np.ndarray], share: float, seed: int
) -> Tuple[np.ndarray, np.ndarray]:
    """The samples to train on, and those to validate on; each sorted, int64.

    The same share of each class is drawn from the seed; at least one sample of it, and never all.

    Args:
        labels: integer (size,); None where they are not known: then the samples count as one class.

    Raises:
        DataError: nothing would remain of a part.
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

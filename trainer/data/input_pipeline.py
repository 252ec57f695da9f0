"""From settings to the training and test set, and to this rank's loaders of them."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

import mxnet as mx

from .. import dist
from ..config import Config, Data
from ..dist.array_memory import on_device
from . import arrays, fashion_mnist
from .arrays import Arrays
from .classes import Classes, numbered, of_labels
from .idx_file import DataError
from .idx_folder import FILES
from .loader import EvalLoader, TrainLoader
from .sources import folder, records
from .sources.base import ArraySource, Source
from .validation import split


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
    def all(self) -> List[Source]:
        """Those that there are."""
        return [source for source in self if source is not None]

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
        named = [len(source.classes) for source in self.all if source.classes is not None]
        highest = [int(s.labels.max()) + 1 for s in self.all if s.labels is not None]
        return max([1, *named, *highest])

    def expect(self, num_classes: int) -> None:
        """Tell the scores of the net, to which labels are held that are read later."""
        for source in self.all:
            source.expect(num_classes)

    def close(self) -> None:
        """Stop their threads and processes."""
        for source in self.all:
            source.close()


FROM_THE_SET = "from the set"  # classes are numbered as the training set has them


def read(
    settings: Data,
    train: Any = None,
    test: Any = None,
    seed: int = 0,
    *,
    known: Union[Classes, str] = FROM_THE_SET,
) -> Sets:
    """The sets of a run: the given ones, or those that ``settings`` name.

    Args:
        train, test: arrays or a dataset, see :func:`arrays.given`; ``test`` may be missing.
        seed: of the run; a validation split is drawn from it.
        known: the classes of a trained net.

    Raises:
        DataError: they cannot be found or are invalid.
    """
    if train is None and test is not None:
        raise DataError("test=... is given without train=...; give both, or train alone")
    classes = None if isinstance(known, str) else known
    training: Source
    validation: Optional[Source] = None
    testing: Optional[Source]
    if train is None and settings.of_pictures:
        find = folder.find if settings.dataset == "folder" else records.find
        training, validation, testing = find(settings, classes)
    else:
        found = _loaded(settings) if train is None else _given(settings, train, test)
        labels = [part[1] for part in found.values() if isinstance(part, tuple)]
        if isinstance(known, str) and isinstance(found["train"], tuple):
            classes = of_labels(labels[0], labels[1] if len(labels) > 1 else None)
        training, *others = in_memory(found, classes)
        testing = others[0] if others else None
    if settings.validation and validation is not None:
        raise DataError(
            f"folder {settings.folder} holds a validation set of its own; set data.validation=0"
        )
    if settings.validation:
        chosen = split(len(training), training.all_labels(), settings.validation, seed)
        training, validation = (training.subset(indices) for indices in chosen)
    return Sets(training, validation, testing)


def _given(settings: Data, train: Any, test: Any) -> Dict[str, Union[Arrays, Source]]:
    parts = {"train": train, "test": test}
    return {k: arrays.given(k, part, settings) for k, part in parts.items() if part is not None}


def _loaded(settings: Data) -> Dict[str, Union[Arrays, Source]]:
    return {name: fashion_mnist.load(name, settings.folder, settings.dataset) for name in FILES}


def in_memory(found: Mapping[str, Union[Arrays, Source]], classes: Classes) -> List[Source]:
    """Sources of arrays, by name, whose labels are ``classes``; a source stays as it is."""
    return [
        ArraySource(part[0], numbered(name, part[1], classes), classes)
        if isinstance(part, tuple)
        else part
        for name, part in found.items()
    ]


def check_shapes(sets: Sets, settings: Data) -> None:
    """Refuse sets whose images a net cannot take both.

    Raises:
        DataError: they differ in size, without ``data.image_size``, or in channels.
    """
    train = sets.train.image_shape
    for name, source in (("validation", sets.validation), ("test", sets.test)):
        if source is None:
            continue
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


def image_size(settings: Data) -> Tuple[int, int]:
    """(height, width) of the images that ``settings`` name, before any resizing."""
    if settings.dataset != "idx":
        return fashion_mnist.IMAGE_SIZE
    height, width = fashion_mnist.load("test", settings.folder, settings.dataset)[0].shape[1:]
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

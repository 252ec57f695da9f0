"""A rank's batches on the device, made by a background thread that keeps ahead of the model."""

from __future__ import annotations

import collections
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Iterator, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..config import Data
from ..dist.array_memory import Place, on_host
from ..errors import UserError
from . import sharding
from .augment import mixing
from .sources.base import Source
from .sources.filler import Filler


class Batch(NamedTuple):
    """One rank's shard of a global batch."""

    data: Any  # float32 (rows, channels, height, width)
    label: Any  # float32 (rows,): Gluon's losses take class indices as floats
    samples: int  # all rows; 0 if the shard is empty and the one row a placeholder
    global_samples: int  # in the global batch, over all ranks
    micro_batches: Tuple[int, ...] = ()  # rows of each, to be processed in turn; (): all at once
    mixed: Optional[mixing.Mixed] = None  # with others of the global batch


class _Batches(NamedTuple):
    """Makes (data, label) of given samples, on the device."""

    filler: Filler
    place: Place

    def make(self, rows: np.ndarray, epoch: int = 0) -> Tuple[Any, Any, Sequence[int]]:
        """(data, label, positions of samples that could not be read)."""
        classes = np.empty(len(rows), np.float32)
        bad: Sequence[int] = ()

        def fill(out: np.ndarray) -> None:
            nonlocal bad
            bad = self.filler(rows, epoch, out, classes)

        data = self.place((len(rows), *self.filler.shape), fill)
        return data, self._placed(classes), bad

    def mixed(
        self, rows: np.ndarray, own: np.ndarray, mix: mixing.Mix, epoch: int
    ) -> Tuple[Any, Any, mixing.Mixed]:
        """(data, label, what is mixed into them) of the samples at ``own`` of the batch ``rows``.

        Their partners are read and augmented here, whichever rank else has them.
        """
        both = np.concatenate([own, mix.partners[own]])
        needed, places = np.unique(both, return_inverse=True)
        pixels = np.empty((len(needed), *self.filler.shape), np.float32)
        classes = np.empty(len(needed), np.float32)
        self.filler(rows[needed], epoch, pixels, classes)
        first, second = places[: len(own)], places[len(own) :]

        def fill(out: np.ndarray) -> None:
            for image, sample, one, other in zip(out, own, first, second):
                mix(sample, pixels[one], pixels[other], image)

        data = self.place((len(own), *self.filler.shape), fill)
        mixed = mixing.Mixed(self._placed(classes[second]), self._placed(mix.shares[own]))
        return data, self._placed(classes[first]), mixed

    def _placed(self, values: np.ndarray) -> Any:
        return self.place(values.shape, lambda out: np.copyto(out, values))


@dataclass
class TrainLoader:
    """This rank's shard of every global batch, epoch after epoch."""

    source: Source  # the whole training set
    settings: Data
    global_batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    parts: int = 1  # micro-batches of each global batch
    place: Place = on_host  # allocates and fills the arrays, e.g. ``array_memory.on_device(ctx)``

    def __post_init__(self) -> None:
        filler = self.source.filler(self.settings, self.seed, training=True)
        self._maker = _Batches(filler, self.place)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return sharding.steps_per_epoch(len(self.source), self.global_batch_size)

    @property
    def shape(self) -> Tuple[int, int, int]:
        """(channels, height, width) of a sample."""
        return self._maker.filler.shape

    def from_step(self, step: int, last_step: int) -> Iterator[Batch]:
        """The batches of steps ``step`` to ``last_step - 1``, counted from the start of the run."""
        return prefetched(self._batches(step, last_step), self.settings.prefetch)

    def _batches(self, step: int, last_step: int) -> Iterator[Batch]:
        order_of = functools.lru_cache(maxsize=1)(
            lambda epoch: sharding.epoch_order(len(self.source), self.seed, epoch)
        )
        for current in range(step, last_step):
            epoch, batch = divmod(current, self.steps_per_epoch)
            indices = sharding.global_batch(order_of(epoch), self.global_batch_size, batch)
            places = np.arange(len(indices))
            shards = sharding.micro_shards(places, self.parts, self.rank, self.world_size)
            # A rank with an empty shard still takes part in collectives: it runs a placeholder.
            own, count = np.concatenate(shards), sum(map(len, shards))
            own, sizes = own if count else places[:1], tuple(map(len, shards))
            alphas, mixed = (self.settings.mixup, self.settings.cutmix), None
            if any(alphas):
                mix = mixing.draw(*alphas, self.seed, current, len(indices), *self.shape[1:])
                data, label, mixed = self._maker.mixed(indices, own, mix, epoch)
            else:
                data, label, _ = self._maker.make(indices[own], epoch)
            yield Batch(data, label, count, len(indices), sizes, mixed)


@dataclass
class EvalLoader:
    """This rank's shard of a set, once, in order, without augmentation.

    ``global_samples`` of a batch is its own size: evaluation has no global batches. Samples that
    cannot be read are left out, where ``data.bad_samples`` is ``skip``.
    """

    source: Source
    settings: Data
    batch_size: int
    rank: int = 0
    world_size: int = 1
    place: Place = on_host

    def __post_init__(self) -> None:
        self._maker = _Batches(self.source.filler(self.settings, 0, training=False), self.place)

    def first(self) -> Optional[Batch]:
        """The first batch alone; None if there is none."""
        return next(self._batches(), None)

    def __iter__(self) -> Iterator[Batch]:
        return prefetched(self._batches(), self.settings.prefetch)

    def _batches(self) -> Iterator[Batch]:
        own = sharding.shard(np.arange(len(self.source)), self.rank, self.world_size)
        for start in range(0, len(own), self.batch_size):
            rows = own[start : start + self.batch_size]
            data, label, bad = self._maker.make(rows)
            if bad:  # not read anew without them: then others may be bad
                left = np.delete(np.arange(len(rows)), list(bad))
                if not len(left):
                    continue
                data, label = data[left], label[left]
            yield Batch(data, label, len(label), len(label))


def prefetched(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """``batches``, made by a background thread that is up to ``depth`` + 1 batches ahead.

    Errors in the thread are raised here. Leaving the iterator early stops the thread.
    """
    with ThreadPoolExecutor(1, "prefetch") as thread:
        ahead = collections.deque(thread.submit(next, batches, None) for _ in range(depth + 1))
        try:
            while (batch := ahead.popleft().result()) is not None:
                ahead.append(thread.submit(next, batches, None))
                yield batch
        except UserError as error:
            error.alone = True
            raise
        finally:
            for made in ahead:
                made.cancel()

"""Batches: the right pixels of the right samples on any number of ranks, made in background."""

from __future__ import annotations

import threading
import time

import mxnet as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.transformed import Transform
from tests.waiting import wait_until
from trainer.config import Data
from trainer.data import sharding
from trainer.data.loader import EvalLoader, TrainLoader, prefetched
from trainer.data.sources.base import ArraySource
from trainer.dist.array_memory import on_device, on_host

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(0, 256, (23, 9, 7), np.uint8)
LABELS = RANDOM.randint(0, 10, 23)
PLAIN = Data(mean=0.0, std=1.0)
BUSY = Data(pad_crop=2, flip=True, erase=0.5, mean=0.3, std=0.4)


def train_loader(settings, rank=0, world_size=1, global_batch_size=8, seed=5, **kwargs):
    return TrainLoader(
        ArraySource(IMAGES, LABELS),
        settings,
        global_batch_size=global_batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        **kwargs,
    )


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


# ---------------------------------------------------------------- pixels


def test_without_augmentation_only_scale_and_shift():
    for training in (True, False):
        out = Transform(IMAGES, Data(), seed=0, training=training)(np.array([3, 0, 3]))
        assert out.dtype == np.float32 and out.shape == (3, 1, 9, 7)
        expected = (IMAGES[[3, 0, 3]] / 255 - Data().mean) / Data().std
        np.testing.assert_allclose(out[:, 0], expected, rtol=0, atol=2e-6)


def test_augmentation_is_drawn_in_training_only():
    out = Transform(IMAGES, BUSY, seed=0, training=False)(np.arange(23), epoch=1)
    expected = (IMAGES / 255 - BUSY.mean) / BUSY.std
    np.testing.assert_allclose(out[:, 0], expected, rtol=0, atol=2e-6)


def test_images_are_not_changed():
    kept = IMAGES.copy()
    Transform(IMAGES, BUSY, seed=0, training=True)(np.arange(23))
    Transform(IMAGES, Data(flip=True, erase=1), seed=0, training=True)(np.arange(23))
    assert (kept == IMAGES).all()


def grey(settings: Data, epoch: int, seed: int = 0, images: np.ndarray = IMAGES) -> np.ndarray:
    """All samples, augmented, back in grey levels."""
    out = Transform(images, settings, seed, training=True)(np.arange(len(images)), epoch)
    return np.rint((out[:, 0] * settings.std + settings.mean) * 255).astype(np.uint8)


def crops_of(image: np.ndarray, pad: int, mirrored: bool) -> list:
    """Every picture that padding, cropping and perhaps mirroring may make of one; one by one."""
    height, width = image.shape
    padded = np.zeros((height + 2 * pad, width + 2 * pad), np.uint8)
    padded[pad : pad + height, pad : pad + width] = image
    crops = [
        padded[y : y + height, x : x + width]
        for y in range(2 * pad + 1)
        for x in range(2 * pad + 1)
    ]
    return crops + [crop[:, ::-1] for crop in crops] if mirrored else crops


@pytest.mark.parametrize("pad, flip", [(1, False), (2, False), (0, True), (1, True)])
def test_crop_and_flip_make_all_the_pictures_they_may_and_no_other(pad, flip):
    settings = Data(pad_crop=pad, flip=flip, mean=0.0, std=1.0)
    epochs = 150
    seen = [grey(settings, epoch) for epoch in range(epochs)]
    for sample in (0, 11):
        allowed = crops_of(IMAGES[sample], pad, flip)
        counts = np.zeros(len(allowed))
        for epoch in range(epochs):
            matches = [np.array_equal(seen[epoch][sample], crop) for crop in allowed]
            assert sum(matches) == 1
            counts += matches
        # Chi-square against equal shares; its mean is len - 1, its variance twice that.
        expected = epochs / len(allowed)
        spread = ((counts - expected) ** 2 / expected).sum()
        freedom = len(allowed) - 1
        assert spread < freedom + 4 * np.sqrt(2 * freedom) + 4
        assert (counts > 0).all() or len(allowed) > 20


def test_half_of_the_images_are_mirrored():
    images = RANDOM.randint(0, 256, (2000, 3, 3), np.uint8)
    out = grey(Data(flip=True, mean=0.0, std=1.0), 0, images=images)
    mirrored = (out == images[:, :, ::-1]).all((1, 2))
    assert (mirrored | (out == images).all((1, 2))).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_erasing_blanks_a_rectangle_in_the_asked_share(share):
    images = np.full((1000, 28, 28), 255, np.uint8)
    settings = Data(erase=share, mean=0.2, std=1.0)
    out = grey(settings, 0, images=images)
    blank = out == round(255 * settings.mean)
    assert (blank | (out == 255)).all()
    erased = blank.any((1, 2))
    assert abs(erased.mean() - share) <= 4 * np.sqrt(share * (1 - share) / 1000)
    for picture in blank[erased]:
        rows, columns = picture.any(1), picture.any(0)
        assert (picture == rows[:, None] & columns[None, :]).all()  # one rectangle
        assert np.diff(np.flatnonzero(rows)).max(initial=1) == 1
        assert np.diff(np.flatnonzero(columns)).max(initial=1) == 1
    if share:
        areas = blank[erased].mean((1, 2))
        assert areas.max() < 0.4
        assert 0.05 < areas.mean() < 0.2  # 2 to 33 %, less what lies over the edge


def test_augmentation_changes_with_epoch_and_seed_only():
    transform = Transform(IMAGES, BUSY, seed=1, training=True)
    everything = np.arange(23)
    assert (transform(everything, 0) == transform(everything, 0)).all()
    assert (transform(everything, 0) != transform(everything, 1)).any()
    other = Transform(IMAGES, BUSY, seed=2, training=True)
    assert (transform(everything, 0) != other(everything, 0)).any()


@pytest.mark.parametrize("size", [1, 5, 14, 28, 40, 96])
def test_resize_is_gluons_within_one_grey_level(size):
    images = RANDOM.randint(0, 256, (4, 28, 28), np.uint8)
    settings = Data(image_size=size, mean=0.0, std=1.0)
    transform = Transform(images, settings, seed=0, training=False)
    assert transform.shape == (1, size, size)
    out = transform(np.arange(4))[:, 0] * 255
    resize = mx.gluon.data.vision.transforms.Resize(size)
    for image, ours in zip(images, out):
        reference = resize(mx.nd.array(image[:, :, None], dtype=np.uint8)).asnumpy()[:, :, 0]
        assert np.abs(ours - reference).max() <= 1


def test_resize_of_images_that_are_not_square():
    transform = Transform(IMAGES, Data(image_size=9, mean=0.0, std=1.0), seed=0, training=False)
    out = transform(np.array([2]))[0, 0] * 255
    reference = mx.nd.image.resize(mx.nd.array(IMAGES[2][:, :, None], dtype=np.uint8), (9, 9))
    assert np.abs(out - reference.asnumpy()[:, :, 0]).max() <= 1


def test_resize_to_the_same_size_changes_nothing():
    images = RANDOM.randint(0, 256, (3, 8, 8), np.uint8)
    plain = Transform(images, PLAIN, seed=0, training=False)(np.arange(3))
    same = Transform(images, Data(image_size=8, mean=0.0, std=1.0), seed=0, training=False)
    assert (same(np.arange(3)) == plain).all()


@pytest.mark.parametrize("settings", [Data(), BUSY, Data(pad_crop=1, flip=True, image_size=12)])
@pytest.mark.parametrize("training", [False, True])
def test_each_channel_of_an_image_goes_the_way_of_a_grey_one(settings, training):
    images = RANDOM.randint(0, 256, (40, 9, 7, 3), np.uint8)
    transform = Transform(images, settings, seed=3, training=training)
    out = transform(np.arange(5, 40), epoch=2)
    assert out.shape == (35, *transform.shape) and transform.shape[0] == 3
    for channel in range(3):
        alone = Transform(images[..., channel], settings, seed=3, training=training)
        np.testing.assert_array_equal(out[:, channel : channel + 1], alone(np.arange(5, 40), 2))


def test_no_samples_make_an_empty_batch():
    for settings in (BUSY, Data(image_size=14)):
        assert Transform(IMAGES, settings, 0, True)(np.arange(0)).shape[0] == 0


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("settings", [BUSY, Data(pad_crop=1, flip=True, image_size=12)])
@pytest.mark.parametrize("global_batch_size", [8, 4])
def test_ranks_share_the_batches_of_one_rank(settings, global_batch_size):
    """Same samples, same augmented pixels, bit for bit; the last batch is uneven."""

    def run(rank, world_size):
        loader = train_loader(settings, rank, world_size, global_batch_size)
        return list(loader.from_step(0, 2 * loader.steps_per_epoch))

    alone = run(0, 1)
    for world_size in (2, 3, 5):
        ranks = [run(rank, world_size) for rank in range(world_size)]
        for step, whole in enumerate(alone):
            parts = [batches[step] for batches in ranks]
            assert sum(part.samples for part in parts) == whole.samples == whole.global_samples
            assert all(part.global_samples == whole.global_samples for part in parts)
            data = np.concatenate([part.data[: part.samples] for part in parts])
            label = np.concatenate([part.label[: part.samples] for part in parts])
            assert data.tobytes() == whole.data.tobytes()
            assert label.tobytes() == whole.label.tobytes()


def test_rank_without_samples_gets_a_stand_in_that_does_not_count():
    loader = train_loader(BUSY, rank=0, world_size=5, global_batch_size=4)
    batch = next(loader.from_step(0, 1))
    assert batch.samples == 0 and batch.global_samples == 4
    assert batch.data.shape == (1, 1, 9, 7) and batch.label.shape == (1,)


@given(world_size=st.integers(1, 6), global_batch_size=st.integers(1, 30), epoch=st.integers(0, 3))
def test_an_epoch_holds_each_sample_once(world_size, global_batch_size, epoch):
    images = np.arange(23, dtype=np.uint8)[:, None, None]
    seen, labels = [], []
    for rank in range(world_size):
        loader = TrainLoader(
            ArraySource(images, np.arange(23)),
            PLAIN,
            global_batch_size=global_batch_size,
            seed=1,
            rank=rank,
            world_size=world_size,
        )
        steps = loader.steps_per_epoch
        for batch in loader.from_step(epoch * steps, (epoch + 1) * steps):
            seen += np.rint(batch.data[: batch.samples].ravel() * 255).astype(int).tolist()
            labels += batch.label[: batch.samples].astype(int).tolist()
    assert sorted(seen) == list(range(23))
    assert seen == labels


def test_starting_in_the_middle_gives_what_a_whole_run_gives_there():
    whole = list(train_loader(BUSY).from_step(0, 9))
    tail = list(train_loader(BUSY).from_step(4, 9))
    assert len(whole) == 9 and len(tail) == 5
    for one, other in zip(whole[4:], tail):
        assert one.data.tobytes() == other.data.tobytes()
        assert one.label.tobytes() == other.label.tobytes()


def test_order_is_the_samplers():
    batch = next(train_loader(PLAIN).from_step(3, 4))  # the first of epoch 1: 3 steps an epoch
    order = sharding.epoch_order(23, 5, 1)
    assert batch.label.tolist() == LABELS[order[:8]].tolist()
    assert batch.label.dtype == np.float32


@pytest.mark.parametrize("settings", [BUSY, Data(image_size=12)])
def test_arrays_on_a_device_hold_what_arrays_on_the_host_do(settings):
    """Each batch is kept to the end: none is written over by a later one."""
    on_the_host = list(train_loader(settings).from_step(0, 7))
    on_the_device = list(train_loader(settings, place=on_device(mx.cpu(0))).from_step(0, 7))
    for host, device in zip(on_the_host, on_the_device):
        for array, expected in zip(device[:2], host[:2]):
            assert isinstance(array, mx.nd.NDArray) and array.dtype == np.float32
            np.testing.assert_array_equal(array.asnumpy(), expected)


@given(size=st.integers(1, 40), world_size=st.integers(1, 7), batch_size=st.integers(1, 50))
def test_evaluation_visits_each_sample_once_in_order(size, world_size, batch_size):
    images = np.arange(size, dtype=np.uint8)[:, None, None]
    seen = []
    for rank in range(world_size):
        loader = EvalLoader(
            ArraySource(images, np.arange(size)),
            PLAIN,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )
        for batch in loader:
            assert 0 < len(batch.data) == len(batch.label) == batch.samples <= batch_size
            assert (np.rint(batch.data.ravel() * 255) == batch.label).all()
            seen += batch.label.astype(int).tolist()
    assert seen == list(range(size))


class Flaky(ArraySource):
    """Of each batch the first sample cannot be read, whichever it is."""

    def filler(self, settings, seed, training):
        fill = super().filler(settings, seed, training)

        class Losing(type(fill)):
            def __call__(self, rows, epoch, data, label):
                super().__call__(rows, epoch, data, label)
                data[0] = label[0] = np.nan
                return [0]

        fill.__class__ = Losing
        return fill


@pytest.mark.parametrize("place", [on_host, on_device(mx.cpu(0))])
def test_an_evaluation_leaves_out_what_cannot_be_read_at_its_first_reading(place):
    settings = Data(mean=0.0, std=1.0, bad_samples="skip")
    source = Flaky(IMAGES[:22], LABELS[:22])
    found = list(EvalLoader(source, settings, batch_size=7, place=place))
    assert [batch.samples for batch in found] == [6, 6, 6]  # and of the last one none
    for start, batch in zip((1, 8, 15), found):
        label, data = (getattr(a, "asnumpy", lambda a=a: a)() for a in batch[1::-1])
        assert label.dtype == data.dtype == np.float32
        assert label.tolist() == LABELS[start : start + 6].tolist()
        np.testing.assert_allclose(data[:, 0], IMAGES[start : start + 6] / 255, rtol=1e-6)


def test_evaluation_can_be_repeated():
    loader = EvalLoader(ArraySource(IMAGES, LABELS), BUSY, batch_size=5)
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == 5
    assert all((a.data == b.data).all() for a, b in zip(first, second))


# ---------------------------------------------------------------- the background thread


def test_everything_comes_in_order_and_the_thread_ends():
    assert list(prefetched(iter(range(50)), 3)) == list(range(50))
    assert not prefetch_threads()
    assert list(prefetched(iter([]), 1)) == []


@pytest.mark.parametrize("depth", [1, 4])
def test_no_more_is_made_ahead_than_asked_for(depth):
    made = []

    def source():
        for number in range(100):
            made.append(number)
            yield number

    batches = prefetched(source(), depth)
    for taken in range(1, 4):
        next(batches)
        # The thread fills the queue and then holds one more that does not fit.
        most = taken + depth + 1
        wait_until(lambda most=most: len(made) >= most, lambda: made)
        time.sleep(0.05)
        assert len(made) == most
    batches.close()
    assert not prefetch_threads()


def test_error_in_the_thread_is_raised_after_what_was_made_before():
    def source():
        yield 1
        yield 2
        raise OSError("bad record 17")

    batches = prefetched(source(), 4)
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(OSError, match="bad record 17"):
        next(batches)
    assert not prefetch_threads()


def test_error_in_a_transform_reaches_the_loop():
    def place(shape, fill):
        raise mx.MXNetError("out of memory")

    with pytest.raises(mx.MXNetError, match="out of memory"):
        list(train_loader(BUSY, place=place).from_step(0, 2))


def test_leaving_early_stops_the_thread():
    def forever():
        while True:
            yield 0

    for _ in prefetched(forever(), 2):
        break
    wait_until(lambda: not prefetch_threads(), prefetch_threads)

    batches = train_loader(BUSY).from_step(0, 10**9)
    next(batches)
    assert prefetch_threads()
    batches.close()
    assert not prefetch_threads()


def test_error_in_the_loop_stops_the_thread():
    with pytest.raises(KeyError):
        for _ in prefetched(iter(range(10**6)), 2):
            raise KeyError
    wait_until(lambda: not prefetch_threads(), prefetch_threads)


def test_nothing_starts_before_the_first_batch_is_asked_for():
    train_loader(BUSY).from_step(0, 10)
    assert not prefetch_threads()

"""A user's dataset, read by processes: its transforms drawn anew, from (seed, epoch, sample)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import mxnet as mx
import numpy as np
import psutil
import pytest
from mxnet.gluon.data import ArrayDataset, Dataset
from mxnet.gluon.data.vision import transforms
from PIL import Image

from tests.waiting import wait_until
from trainer.config import Data
from trainer.data import input_pipeline, randomness
from trainer.data.idx_file import BadSampleError, DataError
from trainer.data.loader import EvalLoader, TrainLoader
from trainer.data.sources import dataset as dataset_module
from trainer.data.sources.dataset import DatasetSource, good

COUNT = 11
IMAGES = np.random.RandomState(0).randint(0, 256, (COUNT, 6, 5, 3)).astype(np.uint8)
LABELS = np.arange(COUNT) % 4
PLAIN = Data("arrays", mean=0.0, std=1 / 255, workers=1)


class Noisy(Dataset):
    """Draws from all three generators; keeps the place and the epoch of a sample apart."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        drawn = (random.random(), np.random.rand(), float(mx.nd.random.uniform().asscalar()))
        return np.array([[[int(255 * number) for number in drawn]]], np.uint8), LABELS[index]


class Given:
    """No Gluon dataset at all: a length and indices."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def batches(dataset, rank=0, world_size=1, start=0, stop=6, **values):
    settings = Data("arrays", **{"mean": 0.0, "std": 1 / 255, "workers": 1, **values})
    source = input_pipeline.read(settings, dataset).train
    assert isinstance(source, DatasetSource)
    loader = TrainLoader(
        source, settings, global_batch_size=4, seed=3, rank=rank, world_size=world_size
    )
    found = list(loader.from_step(start, stop))
    source.close()
    return found


def rows(found):
    return np.concatenate([batch.data[: batch.samples] for batch in found])


def test_transforms_are_drawn_anew_in_each_epoch_for_each_sample():
    found = rows(batches(Noisy()))
    assert len(np.unique(found.reshape(2 * COUNT, 3), axis=0)) == 2 * COUNT
    assert (rows(batches(Noisy())) == found).all()


@pytest.mark.parametrize("workers", [0, 3])
def test_any_number_of_processes_gives_the_same(workers):
    assert (rows(batches(Noisy(), workers=workers)) == rows(batches(Noisy()))).all()


def test_ranks_share_the_batches_of_one_and_resume_in_the_middle():
    alone = batches(Noisy())
    ranks = [batches(Noisy(), rank, 2) for rank in range(2)]
    for step, whole in enumerate(alone):
        assert (rows([found[step] for found in ranks]) == whole.data).all()
    assert (rows(batches(Noisy(), start=4)) == rows(alone[4:])).all()


def test_gluons_own_transforms_are_not_frozen():
    images = IMAGES[:, :, :4]  # MXNet forgets the middle of an odd width
    dataset = ArrayDataset(mx.nd.array(images, dtype="uint8"), LABELS)
    flipped = dataset.transform_first(transforms.RandomFlipLeftRight())
    first, second = (rows(batches(flipped, start=start, stop=start + 3)) for start in (0, 3))
    epochs = [{row.tobytes() for row in found} for found in (first, second)]
    both = [image[:, ::side] for image in images for side in (1, -1)]
    allowed = {np.moveaxis(image, -1, 0).astype(np.float32).tobytes() for image in both}
    assert epochs[0] <= allowed and epochs[1] <= allowed and epochs[0] != epochs[1]


def test_the_users_own_generators_stay_as_they_were():
    random.seed(7)
    np.random.seed(7)
    mx.random.seed(7)
    batches(Noisy())
    drawn = (random.random(), np.random.rand(), float(mx.nd.random.uniform().asscalar()))
    random.seed(7)
    np.random.seed(7)
    mx.random.seed(7)
    assert drawn == (random.random(), np.random.rand(), float(mx.nd.random.uniform().asscalar()))


def test_any_object_with_a_length_and_indices_will_do():
    found = batches(Given(list(zip(IMAGES[..., 0], LABELS))))
    assert found[0].data.shape == (4, 1, 6, 5)
    labels = np.concatenate([batch.label for batch in found[:3]])
    assert sorted(labels) == sorted(LABELS)


def test_a_subset_names_samples_as_the_user_does():
    source = DatasetSource("train", Noisy(), PLAIN).subset(np.array([4, 9]))
    assert len(source) == 2 and source.name(1) == "train[9]"
    assert [label for _, label in source.samples([0, 1], 0, 0)] == [0, 1]
    source.close()


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (IMAGES[0], r"train\[1\] is a ndarray; a dataset must give \(image, label\)"),
        ((IMAGES[0], 1, 2), r"train\[1\] is a tuple of 3; a dataset must give \(image, label\)"),
        ((IMAGES[0] / 255, 1), r"train\[1\] has an image of float64 .*: leave ToTensor, "),
        (
            (IMAGES[0].T, 1),
            r"train\[1\] has .*; it must be uint8 .*channels come last: np\.moveaxis",
        ),
        ((IMAGES[0, 1:], 1), r"train\[1\] has an image of \(5, 5, 3\), the first one is \(6, 5, 3"),
        ((IMAGES[0], 7), r"train\[1\] has the label 7; .* from 0 to 3"),
        ((IMAGES[0], "cat"), r"train\[1\] has the label cat"),
        ((IMAGES[0], np.array([1.0, 0.0])), r"train\[1\] has the label \[1\. 0\.\]"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(sample, says):
    source = DatasetSource("train", Given([(IMAGES[0], 0), sample]), PLAIN)
    assert source.image_shape == (6, 5, 3)
    source.expect(4)
    with pytest.raises(BadSampleError, match=says):
        good(source.samples([0, 1], 0, 0)[1])
    source.close()


class Failing(Noisy):
    def __getitem__(self, index):
        if index == 5:
            raise KeyError("no such picture")
        return super().__getitem__(index)


def test_an_error_of_the_users_own_names_the_sample_and_its_place():
    with pytest.raises(BadSampleError, match=r"train\[5\] cannot be read: KeyError: 'no such pic"):
        batches(Failing())


def test_a_skipped_sample_is_told_once_and_left_out_of_evaluation(capfd):
    found = batches(Failing(), bad_samples="skip")
    assert sum(batch.samples for batch in found) == 2 * COUNT
    assert capfd.readouterr().err.count("train[5] cannot be read") == 1
    settings = Data("arrays", bad_samples="skip", workers=1)
    source = DatasetSource("test", Failing(), settings)
    assert sum(batch.samples for batch in EvalLoader(source, settings, batch_size=3)) == COUNT - 1
    source.close()


class Killed(Noisy):
    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_process_that_dies_is_told():
    with pytest.raises(DataError, match="a process that reads the dataset has died"):
        batches(Killed())


def test_a_bad_first_sample_is_skipped_as_any_other_is():
    settings = Data("arrays", bad_samples="skip", workers=1)
    source = DatasetSource("train", Given([("no picture", 0), (IMAGES[1], 1)]), settings)
    assert source.image_shape == (6, 5, 3)
    source.close()


class Stored:
    """Samples in a file that is open, at places that a reader seeks."""

    def __init__(self, path, mode):
        self.file = open(path, mode, buffering=0)  # noqa: SIM115 (as users do it)

    def __len__(self):
        return 200

    def __getitem__(self, index):
        self.file.seek(3000 * index)
        return np.frombuffer(self.file.read(3000), np.uint8).reshape(30, 100), index


@pytest.mark.parametrize(("workers", "mode"), [(0, "rb"), (3, "rb"), (3, "r+b")])
def test_readers_do_not_move_each_others_place_in_an_open_file(tmp_path, workers, mode):
    pixels = np.repeat(np.arange(200, dtype=np.uint8), 3000)
    pixels.tofile(tmp_path / "images")
    dataset = Stored(tmp_path / "images", mode)
    settings = Data("arrays", workers=workers)
    whole = DatasetSource("train", dataset, settings)
    parts = [whole.subset(np.arange(start, 200, 2)) for start in (0, 1)]  # processes of their own
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:  # at the same time
            for found in pool.map(lambda s: s.samples(range(len(s)), 0, 0), (whole, *parts)):
                assert all((image == label).all() for image, label in found)
    for source in (whole, *parts):
        source.close()
    dataset.file.close()


class Drawing:
    """A transform with a generator of its own, in an attribute."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self, image):
        draw = getattr(self.generator, "randint", None) or self.generator.integers
        return np.full_like(image, draw(0, 255))


def with_default(generator):
    return lambda image, own=generator: image + np.uint8(own.integers(0, 255))


@pytest.mark.parametrize(
    "transform",
    [
        lambda: Drawing(np.random.default_rng(0)),
        lambda: Drawing(np.random.RandomState()),
        lambda: Drawing(random.Random(0)),
        lambda: with_default(np.random.Generator(np.random.MT19937())),
        lambda: lambda image: cv2.randu(image.copy(), 0, 255),
    ],
    ids=["Generator", "RandomState", "Random", "argument", "OpenCV"],
)
def test_generators_of_a_dataset_are_seeded_for_each_sample(transform, capfd):
    """Else other processes draw other numbers, and a run that resumes draws the first again."""

    def dataset():
        return ArrayDataset(IMAGES, LABELS).transform_first(transform())

    alone = rows(batches(dataset()))
    assert len(np.unique(alone[:, 0, 0, 0])) > 9
    assert (rows(batches(dataset(), workers=3)) == alone).all()
    assert (rows(batches(dataset(), start=4)) == alone[COUNT + 4 :]).all()
    with contextlib.closing(input_pipeline.read(PLAIN, dataset())) as sets:
        input_pipeline.tell_of_ranges(sets, PLAIN)
    assert "read again" not in capfd.readouterr().err


def test_two_generators_of_a_dataset_draw_different_numbers():
    one, two = random.Random(0), random.Random(0)
    assert randomness.held([{"a": one}, two, one]) == randomness.held([{"a": one}, two, one])
    randomness.seed_others(7, randomness.held((one, two)))
    assert one.random() != two.random()


def test_a_dataset_that_draws_from_what_is_not_seeded_is_told_of(capfd):
    drawn = ArrayDataset(IMAGES, LABELS).transform_first(
        lambda image: np.random.default_rng().integers(0, 255, image.shape).astype(np.uint8)
    )
    with contextlib.closing(input_pipeline.read(PLAIN, drawn)) as sets:
        input_pipeline.tell_of_ranges(sets, PLAIN)
    said = capfd.readouterr().err
    assert "training samples are others when they are read again: their dataset draws" in said


def test_numbers_of_a_palette_are_not_taken_for_grey():
    pictures = [Image.fromarray(image).quantize(4) for image in IMAGES]
    found = rows(batches(Given(list(zip(pictures, LABELS))), stop=3))
    assert found.shape[1] == 3
    listed = input_pipeline.read(PLAIN, list(zip(pictures, LABELS))).train
    assert (listed.images == [np.asarray(picture.convert("RGB")) for picture in pictures]).all()


def test_torchs_generator_is_seeded_for_each_sample(monkeypatch):
    seeds = []
    torch = types.SimpleNamespace(manual_seed=seeds.append)  # it is no dependency
    monkeypatch.setitem(sys.modules, "torch", torch)
    samples = Given([(IMAGES[0], 0)])
    assert dataset_module._read(samples, 0, 17)[1] == 0 and seeds == [17]


def in_a_process(tmp_path, end):
    """The readers of a process that ends so, and how it did."""
    script = f"""
import os, signal
import numpy as np
from trainer.config import Data
from trainer.data.sources.dataset import DatasetSource

class Blank:
    def __len__(self): return 4
    def __getitem__(self, index): return np.zeros((4, 4), np.uint8), 0

source = DatasetSource("train", Blank(), Data("arrays", workers=2))
source.samples([0, 1], 0, 0)
print(*(process.pid for process in source._readers._processes), flush=True)
{end}
"""
    place = tmp_path / "script.py"
    place.write_text(script)
    command = [sys.executable, str(place)]
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, env=environment, start_new_session=True, timeout=60
    )
    return [int(pid) for pid in done.stdout.split()], done.returncode


@pytest.mark.parametrize(
    ("end", "code"), [("", 0), ("os.kill(os.getpid(), signal.SIGKILL)", -9), ("os._exit(70)", 70)]
)
def test_readers_end_with_their_rank(tmp_path, end, code):
    readers, ended = in_a_process(tmp_path, end)
    assert ended == code and len(readers) == 2
    wait_until(lambda: not any(map(psutil.pid_exists, readers)), lambda: readers)


def test_a_signal_to_all_processes_of_a_rank_leaves_it_its_readers(tmp_path):
    end = """
signal.signal(signal.SIGTERM, lambda *_: None)
os.killpg(0, signal.SIGTERM)
source.samples([2, 3], 0, 0)
os._exit(85)
"""
    assert in_a_process(tmp_path, end)[1] == 85


def test_processes_end_with_their_source():
    source = DatasetSource("train", Noisy(), PLAIN)
    source.samples([0], 0, 0)
    process = source._readers._processes[0]
    source.close()
    assert not process.is_alive()


def test_digests_cover_images_and_repeat():
    def digests(dataset):
        source = DatasetSource("train", dataset, PLAIN)
        found = source.digests()
        source.close()
        return found

    samples = list(zip(IMAGES, LABELS))
    assert digests(Given(samples)) == digests(Given(samples))
    assert digests(Noisy()) == digests(Noisy())
    assert digests(Given([(IMAGES[0] ^ 1, 0), *samples[1:]])) != digests(Given(samples))


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="train holds no image"):
        DatasetSource("train", Given([]), PLAIN)


@pytest.mark.parametrize(
    ("dataset", "told"), [(Noisy(), True), (Given([(IMAGES[0], 0)] * 9), False)]
)
def test_a_split_that_random_transforms_change_is_told_of(dataset, told, capfd):
    settings = Data("arrays", validation=0.3, workers=1)
    sets = input_pipeline.read(settings, dataset)
    input_pipeline.tell_of_ranges(sets, settings)
    sets.close()
    assert ("give validation= a set without" in capfd.readouterr().err) == told


@pytest.mark.parametrize(("gpus", "seeded"), [(0, "all"), (1, "cpu(0)")])
def test_readers_leave_the_generators_of_gpus_alone(monkeypatch, gpus, seeded):
    """Seeding those of a forked process's parent kills it, once dropout has run there."""
    found = []
    monkeypatch.setattr(mx.context, "num_gpus", lambda: gpus)
    monkeypatch.setattr(mx.random, "seed", lambda seed, ctx="all": found.append(str(ctx)))

    class Looking(Given):
        def __getitem__(self, index):
            return IMAGES[0], ["all", "cpu(0)"].index(found[-1])

    source = DatasetSource("train", Looking([0]), PLAIN)
    ((_, label),) = source.samples([0], 0, 0)
    source.close()
    assert ["all", "cpu(0)"][label] == seeded

"""Folders and record files: the same batches from any number of ranks and workers, lazily read."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.pictures import CLASSES, encoded, make_folder, make_records, smooth
from trainer.config import Data
from trainer.data import input_pipeline
from trainer.data.idx_file import BadSampleError, DataError
from trainer.data.loader import EvalLoader, TrainLoader
from trainer.data.sources import folder, records
from trainer.data.sources import pictures as pictures_module

COUNTS = (7, 5, 9)
BUSY = {
    "random_crop": True,
    "flip": True,
    "pad_crop": 2,
    "color_jitter": 0.4,
    "erase": 0.5,
    "mean": "imagenet",
    "std": "imagenet",
}


def settings(root: Path, dataset: str = "folder", **values) -> Data:
    return Data(dataset=dataset, folder=str(root), **{"image_size": 24, "workers": 0, **values})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    make_folder(root / "train", COUNTS)
    make_folder(root / "test", (2, 0, 3)[:1])
    return root


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, pictures) -> Path:
    """The pictures of the folder in two record files, in the same order."""
    root = tmp_path_factory.mktemp("records")
    source = folder.find(settings(pictures))["train"]
    samples = [source.read(index) for index in range(len(source))]
    labelled = [(float(label), content) for content, label in samples]
    make_records(root / "train_0.rec", labelled[:10])
    make_records(root / "train_1.rec", labelled[10:])
    return root


def source_of(root: Path, **values):
    kind = "folder" if (root / "train").is_dir() else "records"
    return input_pipeline.read(settings(root, kind, **values)).train


def batches(root: Path, rank=0, world_size=1, start=0, stop=6, **values):
    given = {**BUSY, **values}
    kind = "folder" if (root / "train").is_dir() else "records"
    chosen = settings(root, kind, **given)
    source = input_pipeline.read(chosen).train
    loader = TrainLoader(
        source, chosen, global_batch_size=8, seed=3, rank=rank, world_size=world_size
    )
    found = list(loader.from_step(start, stop))
    source.close()
    return found


def alike(one, other) -> bool:
    return all(
        a.data.tobytes() == b.data.tobytes() and a.label.tobytes() == b.label.tobytes()
        for a, b in zip(one, other)
    )


# ---------------------------------------------------------------- exactness


def test_an_epoch_holds_each_picture_once_and_the_next_shows_others(pictures):
    found = batches(pictures)
    for epoch in (found[:3], found[3:]):
        labels = np.concatenate([batch.label for batch in epoch])
        assert np.bincount(labels.astype(int)).tolist() == list(COUNTS)
        assert len({row.tobytes() for batch in epoch for row in batch.data}) == sum(COUNTS)
    assert not alike(found[:3], found[3:])
    assert found[0].data.shape == (8, 3, 24, 24) and found[0].data.dtype == np.float32


@pytest.mark.parametrize("workers", [1, 4, None])
def test_any_number_of_workers_makes_the_same_batches(pictures, workers):
    assert alike(batches(pictures), batches(pictures, workers=workers))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches_of_one_rank(pictures, world_size):
    alone = batches(pictures)
    ranks = [batches(pictures, rank, world_size, workers=2) for rank in range(world_size)]
    for step, whole in enumerate(alone):
        data = [found[step].data[: found[step].samples] for found in ranks]
        assert np.concatenate(data).tobytes() == whole.data.tobytes()


@pytest.mark.parametrize("kind", ["folder", "records"])
def test_a_rank_reads_its_own_shards_alone(pictures, recorded, kind):
    root, read = {"folder": pictures, "records": recorded}[kind], []
    chosen = settings(root, kind, **BUSY)
    for rank in range(3):
        source, own = input_pipeline.read(chosen).train, []
        reads = source.read
        source.read = lambda index, own=own, reads=reads: own.append(index) or reads(index)
        loader = TrainLoader(source, chosen, 8, seed=3, rank=rank, world_size=3)
        assert sum(b.samples for b in loader.from_step(0, loader.steps_per_epoch)) == len(own)
        read += own
    assert sorted(read) == list(range(sum(COUNTS)))  # each picture once, by one rank


def test_workers_are_as_many_as_the_rank_has_cores(pictures, monkeypatch):
    monkeypatch.setattr(pictures_module, "cores", lambda: 3)
    with contextlib.closing(source_of(pictures, workers=None)) as source:
        assert source.pool(source.settings)._max_workers == 3


def test_starting_in_the_middle_gives_what_a_whole_run_gives_there(pictures):
    assert alike(batches(pictures)[4:], batches(pictures, start=4, workers=3))


def test_records_give_what_the_folder_gives(pictures, recorded):
    assert alike(batches(pictures), batches(recorded, workers=2))


def test_evaluation_is_in_order_and_never_random(pictures):
    chosen = settings(pictures, **BUSY)
    source = input_pipeline.read(chosen).train
    first, second = (list(EvalLoader(source, chosen, batch_size=4)) for _ in range(2))
    assert alike(first, second)
    labels = np.concatenate([batch.label for batch in first]).astype(int)
    assert labels.tolist() == np.repeat(range(3), COUNTS).tolist()


def test_grey_pictures_have_one_channel(pictures):
    chosen = settings(pictures, channels=1)
    source = input_pipeline.read(chosen).train
    assert source.image_shape == (24, 24)
    assert EvalLoader(source, chosen, batch_size=4).first().data.shape == (4, 1, 24, 24)


# ---------------------------------------------------------------- folders


def test_classes_are_the_folders_sorted_and_hidden_files_are_none(tmp_path):
    make_folder(tmp_path, (1, 2, 3))
    (tmp_path / "cat" / "._0.jpeg").write_bytes(b"")
    (tmp_path / "cat" / "notes.txt").write_text("")
    (tmp_path / ".cache").mkdir()
    train, validation, test = input_pipeline.read(settings(tmp_path))
    assert train.classes == CLASSES and validation is test is None
    assert train.labels.tolist() == [0, 1, 1, 2, 2, 2]
    assert train.name(1) == str(tmp_path / "dog" / "00.png")


def test_a_test_set_may_lack_classes_but_have_no_other(pictures, tmp_path):
    assert folder.find(settings(pictures))["test"].labels.tolist() == [0, 0]
    shutil.copytree(pictures, tmp_path / "set")
    (tmp_path / "set" / "test" / "cat").rename(tmp_path / "set" / "test" / "cow")
    with pytest.raises(DataError, match=r"has a class cow, and what was trained on has not: .*cat"):
        folder.find(settings(tmp_path / "set"))


def test_a_test_set_may_stand_alone_for_a_net_that_is_trained(pictures, tmp_path):
    shutil.copytree(pictures / "test", tmp_path / "test")
    found = input_pipeline.read_one("test", settings(tmp_path), CLASSES)
    assert found.labels.tolist() == [0, 0] and found.called == "test"
    (tmp_path / "test").rename(tmp_path / "val")
    assert input_pipeline.read_one("test", settings(tmp_path), CLASSES).called == "validation"
    make_records(tmp_path / "test.rec", [(1.0, b"x")])
    assert len(input_pipeline.read_one("test", settings(tmp_path, "records"), None)) == 1
    with pytest.raises(DataError, match="but no train"):
        input_pipeline.read_one("train", settings(tmp_path), CLASSES)


@pytest.mark.parametrize("names", [("test",), ("val",), ("train", "test")])
def test_a_net_of_a_run_with_a_split_is_evaluated_on_other_folders(pictures, tmp_path, names):
    for name in names:
        shutil.copytree(pictures / "test", tmp_path / name)
    split = settings(tmp_path, validation=0.5)
    found = input_pipeline.read_one("test", split, CLASSES, own="of another folder")
    assert found.labels.tolist() == [0, 0] and (found.called == "test") == ("test" in names)


def test_a_split_is_drawn_of_the_runs_own_folder_alone_wherever_it_is_now(pictures, tmp_path):
    for place in ("own", "moved", "other"):
        shutil.copytree(pictures / "train", tmp_path / place)
    own = input_pipeline.read(settings(tmp_path / "own", validation=0.5), seed=3).validation
    digest = own.images_digest()
    for path in (tmp_path / "other").glob("*/*"):
        path.rename(path.with_name(f"x{path.name}"))
    for place, given in (("own", None), ("moved", digest)):
        split = settings(tmp_path / place, validation=0.5)
        found = input_pipeline.read_one("test", split, CLASSES, seed=3, own=given)
        assert found.called == "validation" and found.images_digest() == digest
    split = settings(tmp_path / "other", validation=0.5)
    assert input_pipeline.read_one("test", split, CLASSES, seed=3, own=digest) is None


def test_two_validation_sets_are_refused(pictures, tmp_path):
    for name in ("train", "valid", "validation"):
        shutil.copytree(pictures / "train", tmp_path / name)
    with pytest.raises(DataError, match="holds valid and validation; leave one of them"):
        folder.find(settings(tmp_path))


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_set_of_its_own(pictures, tmp_path, name):
    shutil.copytree(pictures, tmp_path / "set")
    shutil.copytree(pictures / "train", tmp_path / "set" / name)
    sets = input_pipeline.read(settings(tmp_path / "set"))
    assert sets.watched is sets.validation and len(sets.validation) == sum(COUNTS)
    with pytest.raises(DataError, match="holds a validation set of its own; set data.validation=0"):
        input_pipeline.read(settings(tmp_path / "set", validation=0.1))
    make_records(tmp_path / "train.rec", [(0.0, b"x"), (1.0, b"y")])
    make_records(tmp_path / "val_a.rec", [(1.0, b"z")])
    sets = input_pipeline.read(settings(tmp_path, "records"))
    assert sets.watched is sets.validation and sets.validation.read(0) == (b"z", 1)
    with pytest.raises(DataError, match="holds a validation set of its own"):
        input_pipeline.read(settings(tmp_path, "records", validation=0.5))


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ((), "holds no folder; it must hold one for each class"),
        (("test/cat",), "holds test, but no train: put"),
        (("train/cat",), r"train/cat holds no picture \(\*\.png.*\); put some into it, or remove"),
        (
            ("Train/cat", "Test/cat"),
            "/Test holds no picture .*but folders: cat; sets are called train, val",
        ),
    ],
)
def test_a_folder_that_is_no_set_is_refused(tmp_path, there, says):
    for name in there:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(DataError, match=says):
        folder.find(settings(tmp_path))
    with pytest.raises(DataError, match="No such file"):
        folder.find(settings(tmp_path / "nowhere"))


def test_digests_tell_other_pictures_apart_and_not_other_places(pictures, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    first = folder.find(settings(pictures))["train"].digests()
    assert folder.find(settings(copy))["train"].digests() == first
    victim = copy / "train" / "cat" / "00.png"
    victim.write_bytes(encoded(smooth(9, 9), "PNG"))
    assert folder.find(settings(copy))["train"].digests()["images"] != first["images"]
    shutil.copy(pictures / "train" / "cat" / "00.png", victim)
    victim.rename(victim.with_name("99.png"))
    assert folder.find(settings(copy))["train"].digests()["images"] != first["images"]


def test_what_is_not_read_is_told_and_links_that_lead_nowhere_are_bad_samples(tmp_path, capfd):
    make_folder(tmp_path, (2, 2))
    (tmp_path / "cat" / "IMG.HEIC").write_bytes(b"")
    (tmp_path / "cat" / "more").mkdir()
    (tmp_path / "cat" / "folder.jpg").mkdir()
    (tmp_path / "dog" / "00.png").rename(tmp_path / "dog" / "00.PNG")
    (tmp_path / "dog" / "gone.jpg").symlink_to("nowhere")
    source = folder.find(settings(tmp_path))["train"]
    assert source.labels.tolist() == [0, 0, 1, 1, 1]
    said = "holds 3 files or folders that are not read: cat/IMG.HEIC, cat/folder.jpg, cat/more\n"
    assert capfd.readouterr().err.endswith(said)
    for name in ("cat", "dog"):
        shutil.copytree(tmp_path / name, tmp_path / "train" / name, symlinks=True)
    shutil.copy(tmp_path / "dog" / "00.PNG", tmp_path / "train" / "loose.png")
    folder.find(settings(tmp_path))
    said = capfd.readouterr().err
    assert "holds 4 files or folders that are not read: loose.png, cat/IMG.HEIC, " in said
    assert f"{tmp_path} holds 2 files or folders that are not read: cat, dog\n" in said
    with pytest.raises(BadSampleError, match=r"dog/gone.jpg cannot be read: No such file"):
        source.digests()


@pytest.mark.parametrize("place", ["", "train"])
def test_a_link_to_itself_is_named(tmp_path, place):
    make_folder(tmp_path / place, (1, 1))
    (tmp_path / place / "loop").symlink_to("loop")
    with pytest.raises(DataError, match="loop cannot be read: Too many levels of symbolic links"):
        folder.find(settings(tmp_path))


def test_a_name_is_the_same_in_either_form_of_unicode(tmp_path):
    """macOS writes an accent as a letter of its own."""
    for name, form in (("train", "NFD"), ("test", "NFC")):
        make_folder(tmp_path / name, (1, 1))
        (tmp_path / name / "dog").rename(tmp_path / name / unicodedata.normalize(form, "café"))
    train, _, test = input_pipeline.read(settings(tmp_path))
    assert train.classes[0] == unicodedata.normalize("NFD", "café")
    assert test.labels.tolist() == [0, 1]
    known = (*CLASSES[:1], "dog", unicodedata.normalize("NFC", "café"))
    assert folder.find(settings(tmp_path), known)["train"].labels.tolist() == [2, 0]


def test_a_name_in_both_forms_of_unicode_is_refused_not_two_classes(tmp_path):
    make_folder(tmp_path, (1, 1))
    for name, form in (("cat", "NFD"), ("dog", "NFC")):
        (tmp_path / name).rename(tmp_path / unicodedata.normalize(form, "café"))
    with pytest.raises(DataError, match=r"two forms of Unicode: 'cafe\\u0301', 'caf\\xe9'; put"):
        folder.find(settings(tmp_path))
    assert folder.find(settings(tmp_path), ("a", "café"))["train"].labels.tolist() == [1, 1]


def test_what_systems_leave_behind_is_no_class(tmp_path, capfd):
    make_folder(tmp_path, (1, 1))
    for name in ("__MACOSX", "lost+found", "System Volume Information", ".Trashes"):
        (tmp_path / name / "cat").mkdir(parents=True)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._00.jpg"):
        (tmp_path / "cat" / name).write_bytes(b"")
    assert folder.find(settings(tmp_path))["train"].classes == ("cat", "dog")
    told = "holds 2 files or folders that are not read: cat/Thumbs.db, cat/desktop.ini\n"
    assert capfd.readouterr().err.endswith(told)


def test_a_class_or_a_set_on_a_disk_that_is_not_there_is_named(tmp_path):
    make_folder(tmp_path / "train", (1, 1))
    (tmp_path / "train" / "owl").symlink_to("/nowhere/owl")
    with pytest.raises(DataError, match="train/owl cannot be read: No such file"):
        folder.find(settings(tmp_path))
    (tmp_path / "train" / "owl").rename(tmp_path / "val")
    with pytest.raises(DataError, match="val cannot be read: No such file"):
        folder.find(settings(tmp_path))


def test_names_that_are_not_utf_8(tmp_path):
    make_folder(tmp_path, (1, 1))
    os.rename(os.fsencode(tmp_path / "dog" / "00.png"), os.fsencode(tmp_path) + b"/dog/\xff.png")
    source = folder.find(settings(tmp_path))["train"]
    assert source.read(1)[1] == 1 and source.name(1).endswith("dog/\\xff.png")
    assert source.digests()


# ---------------------------------------------------------------- bad samples


@pytest.fixture
def damaged(pictures, tmp_path) -> Path:
    root = tmp_path / "damaged"
    shutil.copytree(pictures, root)
    path = root / "train" / "cat" / "01.jpeg"
    path.write_bytes(path.read_bytes()[:200])
    (root / "train" / "owl" / "02.jpeg").write_bytes(b"")
    return root


def test_a_bad_picture_stops_the_run_by_name(damaged):
    with pytest.raises(BadSampleError, match=r"(cat/01|owl/02)\.jpeg is a bad picture: .*skip"):
        batches(damaged, workers=2)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_skipped_picture_is_named_once_and_the_next_stands_in_its_place(damaged, workers, capfd):
    good = batches(damaged.parent / "damaged", bad_samples="skip", workers=workers)
    said = capfd.readouterr().err
    assert len(re.findall("cat/01.jpeg", said)) == len(re.findall("owl/02.jpeg", said)) == 1
    assert "2 so far" in said
    labels = np.concatenate([batch.label for batch in good[:3]])
    assert np.bincount(labels.astype(int)).tolist() == list(COUNTS)
    ranks = [batches(damaged, rank, 2, bad_samples="skip") for rank in range(2)]
    for step, whole in enumerate(good):
        data = [found[step].data[: found[step].samples] for found in ranks]
        assert np.concatenate(data).tobytes() == whole.data.tobytes()


def test_an_evaluation_leaves_a_skipped_picture_out(damaged):
    chosen = settings(damaged, bad_samples="skip")
    source = input_pipeline.read(chosen).train
    found = list(EvalLoader(source, chosen, batch_size=2))
    assert sum(batch.samples for batch in found) == sum(COUNTS) - 2
    assert all(len(batch.data) == len(batch.label) == batch.samples for batch in found)
    assert len(source.skipped) == 2
    only = source.subset(np.array([1]))
    assert list(EvalLoader(only, chosen, batch_size=2)) == []


def test_a_set_of_bad_pictures_alone_is_not_skipped(tmp_path):
    make_folder(tmp_path / "train", (1, 1))
    for path in (tmp_path / "train").glob("*/*"):
        path.write_bytes(b"nothing")
    with pytest.raises(BadSampleError, match="100 samples in a row cannot be read"):
        batches(tmp_path, bad_samples="skip")


# ---------------------------------------------------------------- records


def test_records_are_named_by_file_and_number(recorded):
    source = source_of(recorded)
    assert source.name(12) == f"record 2 of {recorded / 'train_1.rec'}"
    assert source.all_labels().tolist() == np.repeat(range(3), COUNTS).tolist()
    assert source.labels is None  # reading them means a look into every record


def test_a_label_that_the_net_has_not_is_named(recorded):
    source = source_of(recorded)
    with pytest.raises(BadSampleError, match=r"record 2 of .* the label 2.0; .* from 0 to 1"):
        source.expect(2)  # before the first step
    assert source.read(0)[1] == 0
    with pytest.raises(BadSampleError, match=r"record 2 of .* the label 2.0; .* from 0 to 1"):
        source.read(12)


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan")])
def test_a_wrong_label_is_named(tmp_path, label):
    make_records(tmp_path / "train.rec", [(0.0, b"x"), (label, b"x")])
    source = source_of(tmp_path)
    for read in (lambda: source.read(1), source.all_labels, lambda: source.expect(9)):
        with pytest.raises(BadSampleError, match=r"record 1 of .* it must be a whole number from"):
            read()
    skipping = source_of(tmp_path, bad_samples="skip")
    skipping.expect(9)
    assert skipping.all_labels().tolist() == [0, -1]


def test_several_labels_are_refused_and_one_in_a_list_is_taken(tmp_path):
    make_records(tmp_path / "train.rec", [(np.array([2.0]), b"one"), (np.array([1.0, 2.0]), b"x")])
    source = source_of(tmp_path)
    assert source.read(0) == (b"one", 2)
    with pytest.raises(BadSampleError, match="record 1 .* has 2 labels"):
        source.read(1)


def test_a_record_that_holds_the_magic_number_is_put_together(tmp_path):
    content = b"12345678" + (0xCED7230A).to_bytes(4, "little") * 2 + b"the end"
    make_records(tmp_path / "train.rec", [(1.0, content), (0.0, b"next")])
    source = source_of(tmp_path)
    assert source.read(0) == (content, 1) and source.read(1) == (b"next", 0)


def test_a_record_cut_short_is_named(tmp_path):
    path = tmp_path / "train.rec"
    make_records(path, [(0.0, encoded(smooth(20, 20))), (1.0, encoded(smooth(20, 20)))])
    path.write_bytes(path.read_bytes()[:-50])
    source = source_of(tmp_path)
    assert source.read(0)[1] == 0
    for read in (lambda: source.read(1), source.digests):
        with pytest.raises(BadSampleError, match=r"record 1 of .*\.rec is cut short: the file"):
            read()
    assert len(source_of(tmp_path, bad_samples="skip").digests()["images"]) == 32


def test_a_record_is_not_given_the_memory_that_it_claims(tmp_path, monkeypatch):
    path = tmp_path / "train.rec"
    make_records(path, [(0.0, b"x")])
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, 4, (1 << 29) - 1)
    path.write_bytes(content)
    source, read, asked = source_of(tmp_path), os.pread, []
    monkeypatch.setattr(os, "pread", lambda *words: asked.append(words[1]) or read(*words))
    with pytest.raises(BadSampleError, match="is cut short"):
        source.read(0)
    assert sum(asked) <= len(content)


@pytest.mark.parametrize("text", ["", "0\t0\n1\n", "zero\tone\n", "0\t-5\n", "0 0 1 2\n"])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    make_records(tmp_path / "train.rec", [(0.0, b"x")])
    (tmp_path / "train.idx").write_text(text)
    with pytest.raises(DataError, match=r"train\.idx is no index of records"):
        source_of(tmp_path)
    (tmp_path / "train.idx").unlink()
    with pytest.raises(DataError, match=r"needs its index, which im2rec\.py writes"):
        source_of(tmp_path)


def test_records_that_the_index_lacks_are_told_of(tmp_path, capfd):
    make_records(tmp_path / "train.rec", [(0.0, b"x"), (1.0, b"y" * 9), (0.0, b"z")])
    source_of(tmp_path)
    assert not capfd.readouterr().err
    lines = (tmp_path / "train.idx").read_text().splitlines(keepends=True)
    (tmp_path / "train.idx").write_text("".join(lines[1::-1]))  # of an earlier file, or cut short
    assert len(source_of(tmp_path)) == 2
    assert "train.rec goes on behind the last record of its index" in capfd.readouterr().err


def test_an_index_of_another_file_is_noticed(tmp_path):
    make_records(tmp_path / "train.rec", [(0.0, b"x"), (1.0, b"y")])
    (tmp_path / "train.idx").write_text("0\t0\n1\t12\n")
    with pytest.raises(BadSampleError, match="does not begin where its index says, at byte 12"):
        source_of(tmp_path).read(1)


def test_a_folder_without_records_is_refused(tmp_path):
    make_records(tmp_path / "trainval.rec", [(0.0, b"x")])
    says = r"holds no train\.rec, train_\*\.rec or \*_train\.rec; make it by"
    with pytest.raises(DataError, match=says):
        records.find(settings(tmp_path, "records"))


@pytest.mark.parametrize("name", ["pets_train.rec", "pets_0_train.rec"])
def test_records_as_im2rec_names_those_of_a_train_ratio(tmp_path, name, capfd):
    make_records(tmp_path / name, [(0.0, b"x"), (1.0, b"y")])
    make_records(tmp_path / "pets_test.rec", [(1.0, b"z")])
    make_records(tmp_path / "train-a.rec", [(1.0, b"w")])
    make_records(tmp_path / "pets_valid.rec", [(1.0, b"v")])
    train, validation, test = input_pipeline.read(settings(tmp_path, "records"))
    assert len(train) == 3 and validation.read(0) == (b"v", 1) and test.read(0) == (b"z", 1)
    assert not capfd.readouterr().err


def test_records_of_two_sets_are_not_taken_for_those_of_one(tmp_path, capfd):
    for name in ("train", "val", "trainval", "training_notes", "valuable"):
        make_records(tmp_path / f"{name}.rec", [(0.0, b"x")])
    found = records.find(settings(tmp_path, "records"))
    assert {name: len(source) for name, source in found.items()} == {"train": 1, "validation": 1}
    told = "holds 3 files or folders that are not read: training_notes.rec, trainval.rec, valuable."
    assert told in capfd.readouterr().err
    make_records(tmp_path / "train_val.rec", [(0.0, b"x")])  # im2rec's of a list called train
    with pytest.raises(DataError, match=r"train_val\.rec may be of the set train or validation; "):
        records.find(settings(tmp_path, "records"))


def test_records_that_are_written_meanwhile_are_refused(tmp_path):
    path = tmp_path / "train.rec"
    make_records(path, [(0.0, b"old"), (1.0, b"one")])
    source = source_of(tmp_path, bad_samples="skip")
    assert source.read(0) == (b"old", 0)
    make_records(path, [(0.0, b"new"), (1.0, b"two")])
    os.utime(path, ns=(0, 1))  # the clock of the file system may not have moved on
    with pytest.raises(DataError, match=r"train\.rec has been written to since the run began") as e:
        source.read(1)
    assert not isinstance(e.value, BadSampleError)  # not skipped

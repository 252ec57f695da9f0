"""Labels from 1 or in words, names of classes, and the validation split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import Data
from trainer.data import classes, input_pipeline
from trainer.data.idx_file import DataError
from trainer.data.input_pipeline import split

IMAGES = np.zeros((6, 4, 5), np.uint8)
WORDS = np.array(["owl", "cat", "cat", "owl", "dog", "dog"])


def test_labels_from_0_are_left_alone():
    labels = np.array([0, 3, 5, 0, 3, 5])
    train = input_pipeline.read(Data(), (IMAGES, labels)).train
    assert train.classes is None and train.labels is labels


def test_labels_from_1_are_numbered_from_0(capfd):
    sets = input_pipeline.read(Data(), (IMAGES, np.arange(1, 7)), (IMAGES[:2], np.array([6, 1])))
    assert sets.train.classes == (1, 2, 3, 4, 5, 6)
    assert sets.train.labels.tolist() == [0, 1, 2, 3, 4, 5] and sets.test.labels.tolist() == [5, 0]
    assert sets.num_classes == 6
    assert "labels are 1 to 6: score 0 of the net is label 1, etc." in capfd.readouterr().err
    # A 0 in either set says that they are numbered from there.
    sets = input_pipeline.read(Data(), (IMAGES, np.arange(1, 7)), (IMAGES[:2], np.array([6, 0])))
    assert sets.train.classes is None and sets.num_classes == 7 and not capfd.readouterr().err


@pytest.mark.parametrize("words", [WORDS, WORDS.astype(object)])
def test_words_are_numbered_in_order(words):
    sets = input_pipeline.read(Data(), (IMAGES, words), (IMAGES[:1], words[:1]))
    assert sets.train.classes == ("cat", "dog", "owl")
    assert sets.train.labels.tolist() == [2, 0, 0, 2, 1, 1] and sets.test.labels.tolist() == [2]
    assert classes.names(Data("arrays"), sets.train.classes, 4) == ["cat", "dog", "owl", "score 3"]


def test_a_label_that_training_has_not_is_named():
    with pytest.raises(DataError, match="test label 1 is 'cow', which the training set has not"):
        input_pipeline.read(Data(), (IMAGES, WORDS), (IMAGES[:2], np.array(["cat", "cow"])))
    with pytest.raises(DataError, match="test labels are int64, and those of the training"):
        input_pipeline.read(Data(), (IMAGES, WORDS), (IMAGES[:2], np.array([0, 1])))
    with pytest.raises(DataError, match="test labels are texts, and those of the training"):
        input_pipeline.read(Data(), (IMAGES, np.arange(6)), (IMAGES[:1], WORDS[:1]))


@pytest.mark.parametrize("labels", [WORDS, np.arange(1, 7)])
def test_a_dataset_beside_arrays_has_the_labels_of_theirs(labels):
    class Lazily:
        def __len__(self):
            return len(labels)

        def __getitem__(self, index):
            return IMAGES[index], labels[index] if index else "fox"

    given = Data("arrays", workers=1)
    sets = input_pipeline.read(given, (IMAGES, labels), validation=Lazily())
    wrong, *found = sets.validation.samples(range(6), 0, 0)
    assert [label for _, label in found] == sets.train.labels[1:].tolist()
    said = f"validation[0] has the label fox; those of the training set are {min(labels)} to"
    assert str(wrong).startswith(said)
    sets.close()


def test_a_trained_net_knows_its_classes():
    known = input_pipeline.read(Data(), (IMAGES[:2], WORDS[:2]), known=("dog", "cat", "owl"))
    assert known.train.labels.tolist() == [2, 1]
    as_they_are = input_pipeline.read(Data(), (IMAGES, np.arange(1, 7)), known=None)
    assert as_they_are.train.labels.tolist() == [1, 2, 3, 4, 5, 6]


def test_names_from_a_file(tmp_path):
    path = tmp_path / "names"
    path.write_text("Katze\n\n Hund \nEule\n", encoding="utf-8")
    settings = Data(class_names=str(path))
    assert classes.names(settings, ("cat", "dog", "owl"), 4) == ["Katze", "Hund", "Eule", "score 3"]
    with pytest.raises(DataError, match="names 3 classes; the net has 2 scores"):
        classes.names(settings, None, 2)
    path.write_text("Katze\nHund\n", encoding="utf-8-sig")  # as Notepad saves it
    assert classes.names(settings, None, 2) == ["Katze", "Hund"]
    path.write_text("Katze\nHund\nEule\n", encoding="utf-8")
    with pytest.raises(DataError, match="names 3 classes; the set has 2"):
        classes.names(settings, (1, 2), 2)
    path.write_text("Katze\nKatze\n")
    with pytest.raises(DataError, match="must name each class in a line, once"):
        classes.names(settings, None, 2)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        classes.names(Data(class_names=str(tmp_path / "none")), None, 2)


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    share=st.floats(0.01, 0.9),
    seed=st.integers(0, 3),
)
def test_a_split_takes_the_share_of_each_class(counts, share, seed):
    labels = np.repeat(range(len(counts)), counts)
    if max(counts) < 2:
        with pytest.raises(DataError, match="no class of the training set has two"):
            split(len(labels), labels, share, seed)
        return
    train, validation = split(len(labels), labels, share, seed)
    assert sorted([*train, *validation]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        taken = (labels[validation] == label).sum()
        assert taken == min(max(1, round(share * count)), count - 1) if count else taken == 0


def test_a_split_is_drawn_from_the_seed():
    labels = np.arange(100) % 3
    first, again, other = (split(100, labels, 0.2, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert len(split(100, None, 0.2, 1)[1]) == 20


def test_a_split_is_kept_out_of_training():
    images = np.arange(40, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    sets = input_pipeline.read(Data(validation=0.25), (images, np.arange(40) % 2), seed=1)
    seen = [set(source.images[:, 0, 0].tolist()) for source in (sets.train, sets.validation)]
    assert len(seen[0]) == 30 and len(seen[1]) == 10 and not seen[0] & seen[1]
    assert sets.watched is sets.validation and sets.test is None
    assert sets.sizes == {"training": 30, "validation": 10}


def test_a_score_to_spare_has_a_name_of_its_own():
    """Labels from 1 for a net with one score more: the last must not be taken for class 4."""
    found = classes.names(Data("arrays"), (1, 2, 3, 4), 5)
    assert found[:4] == ["1", "2", "3", "4"] and len(set(found)) == 5

"""What a run remembers, as state.json has it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from trainer import checkpoint
from trainer.checkpoint import CheckpointError, RunState
from trainer.errors import show


def rewritten(path: Path, **values) -> Path:
    state = json.loads((path / checkpoint.STATE).read_text())
    (path / checkpoint.STATE).write_text(json.dumps({**state, **values}))
    return path


def said(folder: Path) -> str:
    """Why the state in the folder is refused, after the file's name."""
    with pytest.raises(CheckpointError) as error:
        checkpoint.read_state(folder)
    file, text = str(error.value).split(checkpoint.STATE, 1)
    assert Path(file) == folder
    return text


def test_a_later_format_is_refused_by_its_number(tmp_path, trained):
    assert said(rewritten(trained.save(tmp_path, 1), format=99)) == (
        " has format 99, and this version reads formats up to 1: use the version that wrote it, or "
        "a later one"
    )


@pytest.mark.parametrize("number", ["1", -1, None, 1.0, True])
def test_a_format_that_is_no_number_is_refused(tmp_path, trained, number):
    assert " has format " in said(rewritten(trained.save(tmp_path, 1), format=number))


def test_what_the_format_does_not_know_is_refused(tmp_path, trained):
    path = rewritten(trained.save(tmp_path, 1), momentum=[1.0])
    assert said(path) == " has 'momentum', which format 1 lacks"
    state = json.loads((path / checkpoint.STATE).read_text())
    del state["format"]
    (path / checkpoint.STATE).write_text(json.dumps(state))
    assert said(path) == " has 'momentum', which format 0 lacks"


# Of each value: what is taken, and what is refused.
VALUES = {
    "step": ([0, 1, 2**53 - 1], [-1, 2**53, 1.0, True, "3", None]),
    "totals": (
        [[[-1.5, 0, 0], [0.0, 1.0, 2.0]]],
        [
            [],
            None,
            3,
            [[0.0, 0, 0]],
            [[0, 0, 0, 0]] * 2,
            [["0", 0, 0]] * 2,
            [[0, -1, 0]] * 2,
            [[0, 0, -0.5]] * 2,
            [[float("inf"), 0, 0]] * 2,
            [[float("-inf"), 0, 0]] * 2,
            [[float("nan"), 0, 0]] * 2,
            [[0, float("inf"), 0]] * 2,
            [[0, 0, float("nan")]] * 2,
        ],
    ),
    "accuracy": ([None, 0.5], [1, "0.5", True]),
    "config": ([{}, {"seed": 1}], [None, [], "{}"]),
    "image_shape": (
        [None, [1, 1], [28, 30], [65535, 1], [32, 32, 3]],
        [[], [28], [1, 2, 3, 4], [0, 28], [28, 65536], [28.0, 28], [True, 28], "28", 28],
    ),
    "train_size": ([None, 0, 60000], [1.5, "1", True]),
    "optimizer": ([{}, {"index": 1}], [None, []]),
    "plateau": (
        [None, [0.5, 0], [0.5, 3, 2], [0.5, 2**53 - 1]],
        [[], [0.5], [0.5, 1, 2, 3], [1, 0], [0.5, -1], [0.5, 2**53], [0.5, 1.0], "0.5", {}],
    ),
    "loss_scale": (
        [None, [0.5, 0.0, 0.0], [65536.0, 3.0, 1.0]],
        [[], [1.0, 0.0], [0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [1, 0, 0], [-1.0, 0.0, 0.0], 1.0],
    ),
    "classes": ([None, [], [0, 7], ["cat", 1]], [[0.5], [None], "cat", {"cat": 0}]),
    "class_names": ([None, [], ["cat", "dog"]], [[1], "cat", {}]),
    "launch": ([None, "", "a"], [1, []]),
    "made_of": ([None, {}, {"net": "0f"}], [[], "net", {"net": 1}, {"net": None}]),
    "weights": ([None, "0f"], [1, []]),
    "given": ([None, False, True], [0, 1, "true"]),
    "answers": ([None, [], [0.5, -1.0]], [[1], ["0.5"], 0.5]),
}


def test_every_field_has_values_that_are_taken_and_refused():
    assert {field.name for field in dataclasses.fields(RunState)} == set(VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_values_of_a_state(tmp_path, name):
    good, bad = VALUES[name]
    fresh = json.loads(RunState().as_json())
    for value in good:
        (tmp_path / checkpoint.STATE).write_text(json.dumps({**fresh, name: value}))
        read = getattr(checkpoint.read_state(tmp_path), name)
        assert read == (getattr(RunState(), name) if value is None else value)
    for value in bad:
        (tmp_path / checkpoint.STATE).write_text(json.dumps({**fresh, name: value}))
        value = json.loads(json.dumps(value))
        assert said(tmp_path) == f" says {name} is {show(value)}"


def test_what_an_earlier_version_did_not_write_is_as_it_was_then(tmp_path):
    required = {"step": 3, "totals": [[0.0, 0, 0]] * 2, "config": {}, "optimizer": {}}
    (tmp_path / checkpoint.STATE).write_text(json.dumps(required))
    assert checkpoint.read_state(tmp_path) == RunState(**required)
    for name in required:
        rest = {k: v for k, v in required.items() if k != name}
        (tmp_path / checkpoint.STATE).write_text(json.dumps(rest))
        assert said(tmp_path) == f" says {name} is None"


def test_what_is_no_state_is_refused(tmp_path):
    for text in ("[]", "3"):
        (tmp_path / checkpoint.STATE).write_text(text)
        assert said(tmp_path) == " holds no state of a run"
    (tmp_path / checkpoint.STATE).unlink()
    assert said(tmp_path) == " is missing"


def test_a_run_begins_with_nothing_done_and_its_state_stays_as_it_was_made():
    fresh = RunState()
    empty = {"config": {}, "made_of": {}, "optimizer": {}}
    begun = {"step": 0, "totals": ((0.0, 0.0, 0.0),) * 2, "given": False, **empty}
    assert dataclasses.asdict(fresh) == {**dict.fromkeys(VALUES), **begun}
    with pytest.raises(dataclasses.FrozenInstanceError):
        fresh.step = 1


def test_files_have_the_names_that_the_format_gives_them(tmp_path, trained):
    files = sorted(file.name for file in trained.save(tmp_path, 1).iterdir())
    assert files == ["manifest.json", "model.params", "optimizer.params", "state.json"]


def test_a_state_comes_back_as_it_was(tmp_path):
    state = RunState(
        step=7,
        accuracy=0.5,
        plateau=[0.5, 1, 2],
        totals=[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
        classes=["a", "b"],
        made_of={"net": "0f"},
        given=True,
    )
    (tmp_path / checkpoint.STATE).write_text(state.as_json())
    assert checkpoint.read_state(tmp_path) == state
    assert json.loads(state.as_json())["format"] == 1

"""Live curves in a notebook cell."""

from __future__ import annotations

import json

import pytest
from IPython import display

from trainer.notebook import LiveCurves


def step(number, loss):
    figures = {"epoch": 1, "epochs": 1, "accuracy": 0.5, "images_per_second": None}
    return "[0] " + json.dumps({"event": "step", "step": number, "loss": loss, **figures})


@pytest.fixture
def pictures(monkeypatch):
    """What is displayed, as PNG; the display itself is IPython's, which needs a kernel."""
    shown = []

    class Handle:
        def update(self, picture):
            shown.append(picture.data)

    monkeypatch.setattr(
        display, "display", lambda picture, display_id: shown.append(picture.data) or Handle()
    )
    return shown


def test_each_reading_changes_the_picture_and_prints_nothing(pictures, capsys):
    curves = LiveCurves()
    for number, loss in ((1, 2.0), (2, None), (3, 1.0)):  # a loss that is not finite is null
        curves(step(number, loss))
    evaluation = {
        "event": "evaluation",
        "step": 3,
        "set": "test",
        "samples": 9,
        "loss": 1.1,
        "accuracy": 0.4,
    }
    assert capsys.readouterr().out == ""
    curves(json.dumps(evaluation))
    assert len(set(pictures)) == 4 and all(p.startswith(b"\x89PNG") for p in pictures)
    assert capsys.readouterr().out == "test loss 1.1000  accuracy 0.4000  (9 images)\n"


def test_curves_are_of_the_sets_that_they_say(pictures):
    curves = LiveCurves()
    curves(step(1, 2.0))
    for number, of in ((1, "validation"), (2, "validation"), (2, "test")):
        figures = {"samples": 9, "loss": 1.0, "accuracy": None, "top5_accuracy": None}
        curves(json.dumps({"event": "evaluation", "step": number, "set": of, **figures}))
    found = {name: len(events) for name, events in curves._curves().items()}
    assert found == {"training": 1, "validation": 2, "test": 1}


def test_a_run_without_a_test_set_has_no_accuracy_at_its_end(pictures, capsys):
    end = dict.fromkeys(("accuracy", "best_accuracy", "test_accuracy", "set", "checkpoint"))
    figures = {"state": "done", "seconds": 4.0, "images_per_second": 9.0, "next": {}}
    figures.update(step=8, last_step=8)
    places = {"best_checkpoint": "best", "events": None}
    LiveCurves()(json.dumps({"event": "end", **end, **figures, **places}))
    assert capsys.readouterr().out.splitlines()[0] == "done: 0:04 minutes, 9 images/s"


@pytest.mark.parametrize("line", ["[1] a word", "[1] {half", "{}", '{"event": []}', ""])
def test_other_output_is_printed_unchanged(pictures, capsys, line):
    LiveCurves()(line)
    assert capsys.readouterr().out == line + "\n" and not pictures

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


@pytest.mark.parametrize("line", ["[1] a word", "[1] {half", "{}", '{"event": []}', ""])
def test_other_output_is_printed_unchanged(pictures, capsys, line):
    LiveCurves()(line)
    assert capsys.readouterr().out == line + "\n" and not pictures

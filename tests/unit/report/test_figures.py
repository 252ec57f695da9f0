"""Figures of an evaluation, whatever classes are called."""

from __future__ import annotations

import io

import numpy as np
import pytest

from trainer.report import figures


@pytest.mark.parametrize("names", [("$10_$20", "a$b^$"), ("\\frac", "%"), ("", " ")])
def test_names_are_drawn_as_they_are(names: tuple) -> None:
    images, labels = np.zeros((2, 4, 4), np.uint8), np.array([0, 1])
    shown = figures.Predicted(images, labels, labels[::-1])
    drawn = figures.prediction_figure(shown, names)
    assert drawn.axes[0].texts[0].get_text() == f"{names[0]}\nnot {names[1]}"
    for figure in (drawn, figures.confusion_figure(np.eye(2, dtype=int), names)):
        figure.savefig(io.BytesIO(), format="png")  # mathtext that cannot be parsed raises

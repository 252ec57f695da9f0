"""Figures of an evaluation, whatever classes are called."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib import font_manager as fonts

from trainer.console import warn_once
from trainer.report import figures


@pytest.mark.parametrize("names", [("$10_$20", "a$b^$"), ("\\frac", "%"), ("", " ")])
def test_names_are_drawn_as_they_are(names: tuple) -> None:
    images, labels = np.zeros((2, 4, 4), np.uint8), np.array([0, 1])
    shown = figures.Predicted(images, labels, labels[::-1])
    drawn = figures.prediction_figure(shown, names)
    assert drawn.axes[0].texts[0].get_text() == f"{names[0]}\nnot {names[1]}"
    for figure in (drawn, figures.confusion_figure(np.eye(2, dtype=int), names)):
        figure.savefig(io.BytesIO(), format="png")  # mathtext that cannot be parsed raises


def drawn(name: str) -> str:
    """The name in a picture, in which nothing warns."""
    figure = figures.confusion_figure(np.eye(2, dtype=int), (name, "b"))
    figure.savefig(io.BytesIO(), format="png")
    return str(figure.axes[0].get_yticklabels()[0].get_text())


@pytest.mark.filterwarnings("error")
def test_characters_without_glyphs_are_boxes_until_a_font_has_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That Matplotlib brings, in the place of one that is installed."""
    own, other = map(fonts.findfont, ("DejaVu Sans", "STIXGeneral"))
    known, more = (set(fonts.get_font(path).get_charmap()) for path in (own, other))
    character = next(chr(code) for code in sorted(more - known) if chr(code).isalpha())
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [__file__])
    warn_once.cache_clear()
    for _ in range(2):
        figures._families.cache_clear()
        assert drawn(f"a{character}") == "a\u25a1"
    assert capsys.readouterr().err.count("install one, e.g. fonts-noto-cjk") == 1
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [__file__, other])
    figures._families.cache_clear()
    assert drawn(f"a{character}") == f"a{character}"
    figures._families.cache_clear()

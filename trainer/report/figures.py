"""Matplotlib figures of an evaluation: the confusion matrix, and images with predictions."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Dict, FrozenSet, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np

from ..console import warn_once

COLUMNS = 4  # images in a row
_FONT = 11  # points, on figures of five inches: TensorBoard shows them 330 pixels wide


class Predicted(NamedTuple):
    """Some images of an evaluation."""

    images: np.ndarray  # uint8 (N, H, W[, C])
    labels: np.ndarray  # int (N,), and so below
    predicted: np.ndarray


def confusion_figure(confusion: np.ndarray, names: Sequence[str]) -> Any:
    """A Matplotlib figure of a confusion matrix, int (K, K), in percent of each true class.

    Cells up to half a percent stay empty, so that what is confused stands out.
    """
    side = 5 if len(names) <= 10 else 8
    figure, axes = _figure(side, side)
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    if len(names) <= 100:  # more could not be read, and a thousand take seconds to draw
        shown, how = _drawable(names)
        axes.set_xticks(range(len(names)), shown, rotation=45, ha="right", **how)
        axes.set_yticks(range(len(names)), shown, **how)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title("percent of each true class")
    if len(names) <= 20:  # more could not be read
        for row, column in np.argwhere(shares > 0.5):
            share = shares[row, column]
            colour = "white" if share > 50 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour)
    figure.tight_layout()
    return figure


def prediction_figure(shown: Predicted, names: Sequence[str]) -> Any:
    """A Matplotlib figure of images under their true names.

    Misclassified ones are marked, and have the predicted name as well.
    """
    titles = [
        names[label] if label == guess else f"{names[label]}\nnot {names[guess]}"
        for label, guess in zip(shown.labels, shown.predicted)
    ]
    return grid_figure(shown.images, titles, shown.labels != shown.predicted)


def grid_figure(images: np.ndarray, titles: Sequence[str], marked: Sequence[bool]) -> Any:
    """A Matplotlib figure of images, uint8 (N, H, W[, C]), in rows of four under their titles.

    Those ``marked`` have a red frame and title.
    """
    from matplotlib.patches import Rectangle

    if images.ndim == 4 and images.shape[3] != 3:  # not RGB
        images = images.mean(axis=3)
    # One image of all: separate axes for each would take most of a small run's time.
    count, height, width, *colours = images.shape
    rows, gap = -(-count // COLUMNS), -(-2 * height // 5)  # room for two lines above each image
    grid = np.full((rows * (gap + height), COLUMNS * (width + 2), *colours), 255, np.uint8)
    figure, axes = _figure(5, 5 * grid.shape[0] / grid.shape[1])
    titles, how = _drawable(titles)
    for place, (image, title, red) in enumerate(zip(images, titles, marked)):
        bottom, left = (place // COLUMNS + 1) * (gap + height), place % COLUMNS * (width + 2)
        grid[bottom - height : bottom, left : left + width] = image
        middle, above = left + width / 2, bottom - height - 1
        colour = "red" if red else "black"
        axes.text(middle, above, title, color=colour, ha="center", va="bottom", **how)
        if red:
            corner = (left - 0.5, bottom - height - 0.5)
            axes.add_patch(Rectangle(corner, width, height, fill=False, color="red", linewidth=2))
    axes.imshow(grid, cmap="gray", vmin=0, vmax=255)
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


def _drawable(texts: Sequence[str]) -> Tuple[List[str], Dict[str, Any]]:
    """Texts, with a box for each character of which no font has a glyph, and how to draw them."""
    used = frozenset(c for text in texts for c in text if c.isprintable())
    families, lacking = _families(used)
    if lacking:
        warn_once("names in pictures are in no installed font: install one, e.g. fonts-noto-cjk")
    how = {"fontsize": _FONT, "parse_math": False, "family": families}  # a class may be named $10
    return [text.translate(dict.fromkeys(map(ord, lacking), "\u25a1")) for text in texts], how


@functools.lru_cache(maxsize=None)
def _families(used: FrozenSet[str]) -> Tuple[List[str], FrozenSet[str]]:
    """Families of fonts for these characters, Matplotlib's and installed ones; what they lack."""
    from matplotlib import font_manager as fonts

    def paths() -> Iterator[str]:
        yield fonts.findfont("DejaVu Sans")
        # Matplotlib's own list may be of before one was installed.
        yield from sorted(fonts.findSystemFonts(), key=lambda p: ("Regular" not in p, p))

    families: List[str] = []
    for path in paths():
        with contextlib.suppress(OSError, RuntimeError):  # of a kind that Matplotlib does not read
            font = fonts.get_font(path)
            had = {c for c in used if font.get_char_index(ord(c))}
            if families and had:
                fonts.fontManager.addfont(path)
            if had or not families:
                families.append(font.family_name)
                used -= had
        if not used:
            break
    return families, used


def _figure(width: float, height: float) -> Any:
    # Not pyplot, which needs a display. Imported late, because it takes half a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()

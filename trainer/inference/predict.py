"""Class predictions and probabilities for images, as CSV, JSON or a picture."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Iterator, List, NamedTuple, Tuple

import numpy as np

from .images import Images
from .trained_model import Saved, scores

SHOWN = 64  # images in a picture
COLUMNS = 8


class Predictions(NamedTuple):
    """The predictions for N images."""

    images: Images
    class_names: List[str]  # K names
    probabilities: np.ndarray  # float64 (N, K), rows sum to 1

    @property
    def classes(self) -> np.ndarray:
        """The most probable class of each image, int64 (N,)."""
        return self.probabilities.argmax(axis=1)


def predict(saved: Saved, images: Images) -> Predictions:
    """Run the net on ``images``, resized and normalised as in training."""
    logits = scores(saved, images.pixels).astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return Predictions(images, saved.class_names, powers / powers.sum(axis=1, keepdims=True))


def as_csv(predictions: Predictions) -> str:
    """A row per image: name, predicted class, its probability, then those of all classes."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["image", "class", "probability", *predictions.class_names])
    for name, best, row in _rows(predictions):
        shown = [f"{share:.6f}" for share in row]
        lines.writerow([name, predictions.class_names[best], shown[best], *shown])
    return text.getvalue()


def as_json(predictions: Predictions) -> str:
    """A list with an object for each image: ``image``, ``class``, ``probability``, and
    ``probabilities`` of every class by its name.
    """
    names = predictions.class_names
    answers = [
        {
            "image": name,
            "class": names[best],
            "probability": round(float(row[best]), 6),
            "probabilities": {k: round(float(share), 6) for k, share in zip(names, row)},
        }
        for name, best, row in _rows(predictions)
    ]
    return json.dumps(answers, indent=1, ensure_ascii=False) + "\n"


def _rows(predictions: Predictions) -> Iterator[Tuple[str, int, np.ndarray]]:
    return zip(predictions.images.names, predictions.classes, predictions.probabilities)


def write_picture(predictions: Predictions, path: Path) -> None:
    """Write a PNG of the first images as the net saw them, with predictions, red below 50 %."""
    # Not pyplot, which needs a display. Imported late, because it takes half a second.
    from matplotlib.figure import Figure

    count = min(SHOWN, len(predictions.images.names))
    rows = -(-count // COLUMNS)
    figure = Figure(figsize=(12, 1.8 * rows), dpi=80)
    for place, (_, best, row) in zip(range(count), _rows(predictions)):
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        axes.imshow(predictions.images.pixels[place], cmap="gray", vmin=0, vmax=255)
        axes.axis("off")
        title = f"{predictions.class_names[best]}\n{row[best]:.0%}"
        axes.set_title(title, fontsize=9, color="black" if row[best] >= 0.5 else "red")
    figure.subplots_adjust(0.01, 0.02, 0.99, 1 - 0.5 / (1.8 * rows), wspace=0.1, hspace=0.5)
    figure.savefig(path, format="png")

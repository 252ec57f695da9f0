"""Class predictions and probabilities for images, as CSV, JSON or a picture."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Iterator, List, NamedTuple, Tuple

import numpy as np

from ..report import figures
from ..step.loss import are_probabilities
from .images import Images
from .trained_model import Saved, scores

SHOWN = 64  # images in a picture


class Predictions(NamedTuple):
    """The predictions for N images."""

    images: Images
    class_names: List[str]  # K names
    probabilities: np.ndarray  # float64 (N, K), rows sum to 1


def predict(saved: Saved, images: Images) -> Predictions:
    """Run the net on ``images``, resized and normalised as in training."""
    shares = scores(saved, images.pixels).astype(np.float64)
    if not are_probabilities(shares):  # the net has no softmax of its own
        shares = np.exp(shares - shares.max(axis=1, keepdims=True))
    return Predictions(images, saved.class_names, shares / shares.sum(axis=1, keepdims=True))


def as_csv(predictions: Predictions) -> str:
    """A row per image: name, predicted class, its probability, then those of all classes.

    A name that a spreadsheet would take for a formula begins with an apostrophe.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    names = [_no_formula(name) for name in predictions.class_names]
    lines.writerow(["image", "class", "probability", *names])
    for name, best, row in _rows(predictions):
        shown = [f"{share:.6f}" for share in row]
        lines.writerow([_no_formula(name), names[best], shown[best], *shown])
    return text.getvalue()


def _no_formula(name: str) -> str:
    with contextlib.suppress(ValueError):
        float(name)  # a class may be -1
        return name
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


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
    """(name, most probable class, probabilities) of each image."""
    shares = predictions.probabilities
    return zip(predictions.images.names, shares.argmax(axis=1), shares)


def write_picture(predictions: Predictions, path: Path) -> None:
    """Write a PNG of the first images as the net saw them, with predictions, red below 50 %."""
    shown = list(_rows(predictions))[:SHOWN]
    titles = [f"{predictions.class_names[best]}\n{row[best]:.0%}" for _, best, row in shown]
    doubtful = [bool(row[best] < 0.5) for _, best, row in shown]
    figure = figures.grid_figure(predictions.images.pixels[:SHOWN], titles, doubtful)
    figure.savefig(path, format="png")

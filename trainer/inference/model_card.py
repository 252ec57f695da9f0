"""A model card in Markdown: the model, its training data, its accuracy and its limits.

After Mitchell et al., "Model cards for model reporting", FAT* 2019.
"""

from __future__ import annotations

import html
import importlib.metadata
import platform
import re
from typing import List, Optional, Sequence

import mxnet as mx
import numpy as np

from .. import config
from ..console import one_line
from ..data.pictures import crop
from ..step.evaluation import Evaluation
from .export import Checked
from .trained_model import Saved

_PACKAGES = ("horovod", "numpy", "onnx", "onnxruntime")


def as_markdown(
    saved: Saved,
    seen: Optional[Evaluation],
    command: str,
    files: Sequence[Checked],
    called: str = "test",
) -> str:
    """The card of ``saved``.

    Args:
        seen: the evaluation on the test set; None where there is none, or ``fit`` was given it.
        command: the command line that made the files.
        files: the exported files, verified.
        called: the set of ``seen``; validation where there is no test set.
    """
    settings, arguments = saved.config, saved.config.model.arguments
    trained = (p for p in saved.net.collect_params().values() if p.grad_req != "null")
    parameters = sum(int(np.prod(p.shape)) for p in trained)
    limits = (
        "Trained on shop photographs of single garments, light on black, trimmed and centred. "
        "Predictions for anything else, photographs on white included, are meaningless."
        if settings.data.dataset.startswith("fashion_mnist")
        else "Valid only for images like those it was trained on."
    )
    lines = [
        f"# {_plain(settings.name)}",
        "",
        f"`{settings.model.factory}`{f' with {arguments}' if arguments else ''}, "
        f"{parameters:,} parameters, trained on `{settings.data.dataset}`.",
        "",
        *_facts(saved, seen, called),
        "",
        f"**Limits.** {limits} Nothing else was measured: no other data, no robustness, no bias.",
        "",
        *_class_table(seen, [_plain(name) for name in saved.class_names]),
        "## Files",
        "",
        f"Each file was compared with the checkpoint, on the whole {called} set if there is one:",
        "",
        *(f"- {checked}" for checked in files),
        "",
        f"    {command}",
        "",
        *_training(saved),
        "",
    ]
    return "\n".join(lines)


def _facts(saved: Saved, seen: Optional[Evaluation], called: str) -> List[str]:
    """The table of input, output, results and origin."""
    settings = saved.config
    data, train = settings.data, settings.train
    height, width = saved.image_shape[:2]
    channels = saved.image_shape[2] if saved.image_shape[2:] else 1
    side = data.image_size
    resized = "" if side in (None, height) else f", resized (bilinear) to {side} x {side}"
    if data.of_pictures:
        resized = f" cut from the middle, the shorter side {crop.shorter_side(data)} pixels"
    flips = settings.evaluate.flip and seen is not None
    weights = f", weights of {saved.weights.name}" if saved.weights else ""
    return [
        "| | |",
        "| --- | --- |",
        f"| input | float32 (N, {channels}, {side or height}, {side or width}): "
        f"{saved.pixels}, {height} x {width} pixels{resized}, "
        f"(pixel / 255 - {_shown(data.mean_text)}) / {_shown(data.std_text)} |",
        f"| output | logits, float32 (N, {saved.num_classes}); softmax gives probabilities |",
        *_result_rows(saved, seen, called),
        *(["| evaluated | on the mean scores of each image and of its mirror image |"] * flips),
        f"| checkpoint | {saved.path.name}{weights}, of a run of up to {train.epochs} epochs of "
        f"global batch {train.global_batch_size}, batch norm {settings.batch_norm}"
        f"{f', moving average of weights ({train.ema:g})' if train.ema else ''} |",
        f"| seed | {settings.seed} |",
        f"| versions | {_versions()} |",
    ]


def _shown(numbers: str) -> str:
    return f"({numbers})" if "," in numbers else numbers


def _training(saved: Saved) -> List[str]:
    """The section on training the model again, with its config."""
    again = (
        "fit(config=trainer.config.load(FILE), train=..., test=...)"
        if saved.on_given_images
        else "python -m trainer train FILE"
    )
    return [
        "## Training",
        "",
        f"Save this as FILE and train again with `{again}`, on any number of ranks.",
        "",
        "```yaml",
        config.as_yaml(saved.config).rstrip("\n"),
        "```",
    ]


def _result_rows(saved: Saved, seen: Optional[Evaluation], called: str) -> List[str]:
    if seen is None:
        given = "the test set was given to `fit` and is not kept"
        why = given if saved.on_given_images else "no test set was found"
        return [f"| accuracy | not measured: {why} |"]
    chosen = saved.accuracy is not None and called == saved.chosen_on
    return [
        f"| accuracy | **{seen.accuracy:.4f}** on the {seen.samples} images of the {called} set"
        f"{', on which the checkpoint was chosen' if chosen else ''} |",
        f"| {called} loss | {seen.loss:.4f} (cross entropy, nats) |",
    ]


def _class_table(seen: Optional[Evaluation], names: Sequence[str]) -> List[str]:
    """Recall, precision and most frequent confusion of each class."""
    if seen is None:
        return []
    lines = [
        "## Per class",
        "",
        "| class | images | recall | precision | most often confused with |",
        "| --- | --: | --: | --: | --- |",
    ]
    named = seen.confusion.sum(axis=0)
    for label, name in enumerate(names):
        row = seen.confusion[label]
        hits = row[label]
        others = np.where(np.arange(len(row)) == label, 0, row)
        other = f"{names[int(others.argmax())]} ({others.max()})" if others.any() else ""
        recall, precision = (f"{hits / n:.1%}" if n else "" for n in (row.sum(), named[label]))
        lines.append(f"| {name} | {row.sum()} | {recall} | {precision} | {other} |")
    return [*lines, ""]


def _plain(name: str) -> str:
    """A name as text of one line, whatever Markdown or HTML it holds."""
    return html.escape(re.sub(r"([\\`*\[\]|])", r"\\\1", one_line(name)), quote=False)


def _versions() -> str:
    found = [f"Python {platform.python_version()}", f"MXNet {mx.__version__}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:  # onnx need not be there
            continue
    return ", ".join(found)

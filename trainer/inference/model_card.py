"""A model card in Markdown: the model, its training data, its accuracy and its limits.

After Mitchell et al., "Model cards for model reporting", FAT* 2019.
"""

from __future__ import annotations

import contextlib
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
from ..data.transform import planes_shape
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
    again = (
        "fit(config=trainer.config.load(FILE), train=..., test=...)"
        if saved.on_given_images
        else "python -m trainer train FILE"
    )
    facts = "\n".join(_facts(saved, seen, called))
    table = "" if seen is None else _class_table(seen, [_plain(name) for name in saved.class_names])
    compared = "\n".join(f"- {file}" for file in files)
    return f"""# {_plain(settings.name)}

`{settings.model.factory}`{f" with {arguments}" if arguments else ""}, \
{parameters:,} parameters, trained on `{settings.data.dataset}`.

| | |
| --- | --- |
{facts}

**Limits.** {limits} Nothing else was measured: no other data, no robustness, no bias.

{table}## Files

Each file was compared with the checkpoint, on the whole {called} set if there is one:

{compared}

    {command}

## Training

Save this as FILE and train again with `{again}`, on any number of ranks.

```yaml
{config.as_yaml(saved.config).rstrip()}
```
"""


def _facts(saved: Saved, seen: Optional[Evaluation], called: str) -> List[str]:
    """The rows of input, output, results and origin."""
    settings = saved.config
    data, train = settings.data, settings.train
    channels, height, width = planes_shape(saved.image_shape)
    side = data.image_size
    resizes = side is not None and (height, width) != (side, side)
    resized = f", resized (bilinear) to {side} x {side}" if resizes else ""
    if data.of_pictures:
        resized = f" cut from the middle, the shorter side {crop.shorter_side(data)} pixels"
    flips = settings.evaluate.flip and seen is not None
    weights = f", weights of {saved.weights.name}" if saved.weights else ""
    return [
        f"| input | float32 (N, {channels}, {side or height}, {side or width}): "
        f"{saved.pixels}, {height} x {width} pixels{resized}, "
        f"(pixel / 255 - ({data.mean_text})) / ({data.std_text}) |",
        f"| output | logits, float32 (N, {saved.num_classes}); softmax gives probabilities |",
        *_result_rows(saved, seen, called),
        *(["| evaluated | on the mean scores of each image and of its mirror image |"] * flips),
        f"| checkpoint | {saved.path.name}{weights}, of a run of up to {train.epochs} epochs of "
        f"global batch {train.global_batch_size}, batch norm {settings.batch_norm}"
        f"{f', moving average of weights ({train.ema:g})' if train.ema else ''} |",
        f"| seed | {settings.seed} |",
        f"| versions | {_versions()} |",
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


def _class_table(seen: Evaluation, names: Sequence[str]) -> str:
    """Recall, precision and most frequent confusion of each class."""
    table = """## Per class

| class | images | recall | precision | most often confused with |
| --- | --: | --: | --: | --- |
"""
    named = seen.confusion.sum(axis=0)
    for label, (name, row) in enumerate(zip(names, seen.confusion)):
        others = np.where(np.arange(len(row)) == label, 0, row)
        other = f"{names[int(others.argmax())]} ({others.max()})" if others.any() else ""
        shares = [f"{row[label] / n:.1%}" if n else "" for n in (row.sum(), named[label])]
        table += f"| {name} | {row.sum()} | {shares[0]} | {shares[1]} | {other} |\n"
    return f"{table}\n"


def _plain(name: str) -> str:
    """A name as text of one line, whatever Markdown or HTML it holds."""
    return html.escape(re.sub(r"([\\`*\[\]|])", r"\\\1", one_line(name)), quote=False)


def _versions() -> str:
    found = [f"Python {platform.python_version()}", f"MXNet {mx.__version__}"]
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # onnx need not be there
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)

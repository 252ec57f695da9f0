"""Ablation: the accuracy of a short run of the best preset, and of runs that differ in one choice.

    python -m benchmarks.accuracy_choices [--only "width,EMA"] [--epochs 2] [SETTING=VALUE]...

Two ranks, one run of each with the preset's seed; settings hold for all. Choices not selected keep
their results in ``results/accuracy_choices.json``, and those of as many epochs stay in the table,
which goes into ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List

from benchmarks import report, speed
from trainer.report import result

NAME = "accuracy_choices"
PRESET = "configs/fashion_mnist_best.yaml"
AS_IS = "as it is"
CHOICES: Dict[str, List[str]] = {
    AS_IS: [],
    "the seed's stem": ["model.arguments.stem=seed"],
    "the seed's stem, at 56 x 56": ["model.arguments.stem=seed", "data.image_size=56"],
    "width 8": ["model.arguments.width=8"],
    "no crops": ["data.pad_crop=0"],
    "no flips, in training and evaluation": ["data.flip=false", "evaluate.flip=false"],
    "no erasing": ["data.erase=0"],
    "no label smoothing": ["train.label_smoothing=0"],
    "mixup 0.2": ["data.mixup=0.2"],
    "EMA 0.999": ["train.ema=0.999"],
    "a constant learning rate after the warm-up": ["schedule.name=constant"],
    "bfloat16": ["train.precision=bfloat16"],
}


def run(settings: List[str], epochs: int) -> Dict[str, Any]:
    """Train on two ranks; accuracy on the test images, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*speed.OWN_LAUNCHER, sys.executable, "-m", "trainer", "train", PRESET]
        own = [f"output={folder}", "name=run", f"train.epochs={epochs}", "schedule.warmup_epochs=1"]
        subprocess.run([*command, *own, *settings], check=True, stdout=subprocess.DEVNULL)
        found = result.read(Path(folder, "run"))
    return {"accuracy": found.test_accuracy, "seconds": found.seconds, "epochs": epochs}


def main() -> None:
    """Measure the selected choices, print the table and insert it into the docs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="parts of choices' names, with commas between")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    parts = args.only.split(",") if args.only else [""]
    before, path = report.machine(), report.RESULTS / f"{NAME}.json"
    found = json.loads(path.read_text())["figures"] if path.exists() else {}
    parts += [] if AS_IS in found else [AS_IS]
    for name in [name for name in CHOICES if any(part in name for part in parts)]:
        found[name] = run([*CHOICES[name], *args.settings], args.epochs)
        print(f"{name}: {found[name]}", flush=True)
        report.write(NAME, found, before)
    report.include(speed.PAGE, f"benchmarks.{NAME}", table(found))


def table(found: Dict[str, Any]) -> str:
    """Accuracies, and how far they are from that of the preset as it is, in Markdown."""
    usual = found[AS_IS]
    alike = {n: found[n] for n in CHOICES if n in found and found[n]["epochs"] == usual["epochs"]}
    rows = [
        (
            name,
            f"{100 * one['accuracy']:.2f} %",
            f"{100 * (one['accuracy'] - usual['accuracy']):+.2f}" if one is not usual else "",
            f"{one['seconds']:.0f}",
        )
        for name, one in alike.items()
    ]
    return report.table(("choice", "test accuracy", "points", "seconds"), rows)


if __name__ == "__main__":
    main()

"""Records the results of a finished run: ``python -m benchmarks.record_run runs/NAME COMMAND...``.

Reads the run's event files and config, and writes ``results/NAME.json`` with the accuracy after
each epoch, the wall time from the first to the last point, and the command that made the run.
``--picture FILE``, before the run, also plots loss and accuracy; of ``results/NAME.json``, given in
place of the run, it plots them alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Dict

import yaml
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import report


def main() -> None:
    """Write the file and print the last figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what was typed to make the run")
    args = parser.parse_args()
    if args.run.suffix == ".json":
        draw(json.loads(args.run.read_text())["figures"], args.picture)
        return
    events = EventAccumulator(str(args.run / "events"))
    events.Reload()
    points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    first = min(series[0].wall_time for series in points.values())
    last = max(series[-1].wall_time for series in points.values())
    figures: Dict[str, Any] = {
        "made by": " ".join(args.command),
        "minutes between first and last point": round((last - first) / 60, 1),
        **{
            f"{name} {what}": {p.step: round(p.value, 4) for p in points[f"{what}/{name}"]}
            for name in ("validation", "test")
            for what in ("accuracy", "loss")
            if f"{what}/{name}" in points
        },
        "training loss": {p.step: round(p.value, 4) for p in points["loss/epoch"]},
        "config": yaml.safe_load((args.run / "config.yaml").read_text()),
    }
    if args.picture is not None:
        draw(figures, args.picture)
    path = report.write(args.run.name, figures, report.machine())
    final = points["accuracy/test"][-1].value
    print(f"{final:.4f} in {figures['minutes between first and last point']} minutes: {path}")
    print(json.dumps(figures["test accuracy"]))


def draw(figures: Dict[str, Any], picture: Path) -> None:
    """Plot the losses of each epoch, and the accuracy of the set that is evaluated after it."""
    watched = "validation" if "validation accuracy" in figures else "test"
    figure = Figure(figsize=(9, 3), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    for name in ("training loss", f"{watched} loss"):
        values = list(figures[name].values())
        losses.plot(range(1, len(values) + 1), values, marker="o", label=name)
    losses.legend()
    values = [100 * share for share in figures[f"{watched} accuracy"].values()]
    accuracy.plot(range(1, len(values) + 1), values, marker="o")
    accuracy.set_ylabel(f"{watched} accuracy, %")
    for axes in (losses, accuracy):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()

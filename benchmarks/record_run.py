"""Records the results of a finished run: ``python -m benchmarks.record_run runs/NAME COMMAND...``.

Reads the run's event files and config, and writes ``results/NAME.json`` with the accuracy after
each epoch, the wall time from the first to the last point, and the command that made the run.
``--picture FILE``, before the run, also plots the accuracy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Dict, Sequence

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
    events = EventAccumulator(str(args.run / "events"))
    events.Reload()
    points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    first = min(series[0].wall_time for series in points.values())
    last = max(series[-1].wall_time for series in points.values())
    figures: Dict[str, Any] = {
        "made by": " ".join(args.command),
        "minutes between first and last point": round((last - first) / 60, 1),
        "test accuracy": {p.step: round(p.value, 4) for p in points["test/accuracy"]},
        "test loss": {p.step: round(p.value, 4) for p in points["test/loss"]},
        "training loss": {p.step: round(p.value, 4) for p in points["epoch/loss"]},
        "config": yaml.safe_load((args.run / "config.yaml").read_text()),
    }
    if args.picture is not None:
        draw(list(figures["test accuracy"].values()), args.picture)
    path = report.write(args.run.name, figures, report.machine())
    final = points["test/accuracy"][-1].value
    print(f"{final:.4f} in {figures['minutes between first and last point']} minutes: {path}")
    print(json.dumps(figures["test accuracy"]))


def draw(accuracy: Sequence[float], picture: Path) -> None:
    """Plot the test accuracy after each epoch."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot(
        xlabel="epoch", ylabel="test accuracy, %", xlim=(0, len(accuracy) + 0.5)
    )
    axes.plot(range(1, len(accuracy) + 1), [100 * share for share in accuracy], marker="o")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()

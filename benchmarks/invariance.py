"""Compares the losses of one config on 1, 2 and 4 ranks, step by step, to a reordering floor.

    python -m benchmarks.invariance [--steps 30] [--ranks 1,2,4]

Thirty steps of the seed's net with augmentation, warm-up and ``batch_norm: sync`` on the 2,000
images of the sample, through the real command line under horovodrun. The floor is the same run on
one rank with every global batch reversed: the same sums with different rounding.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List

from benchmarks import report

SHOWN = (1, 2, 3, 5, 10, 15, 20, 25, 30)  # steps shown in the table
SETTINGS = [
    "data.dataset=fashion_mnist_sample",
    "data.pad_crop=2",
    "data.flip=true",
    "data.erase=0.25",
    "batch_norm=sync",
    "optimizer.lr=0.002",
    "optimizer.nesterov=true",
    "schedule.warmup_epochs=1",
    "train.epochs=3",
    "train.global_batch_size=100",
    "monitor.every_steps=1",
]


def losses(output: Path, steps: int, ranks: int, reverse: bool = False) -> List[float]:
    """The training loss of each step, from the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    name = f"{ranks}-ranks{'-reversed' if reverse else ''}"
    module = "benchmarks.reversed_order" if reverse else "trainer"
    command = [sys.executable, "-m", module, "train", *SETTINGS, f"train.max_steps={steps}"]
    command += [f"output={output}", f"name={name}"]
    if ranks > 1:
        horovodrun = str(Path(sys.executable).with_name("horovodrun"))
        command = [horovodrun, "-np", str(ranks), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    events = EventAccumulator(str(output / name / "events"))
    events.Reload()
    return [point.value for point in events.Scalars("loss/train")]


def all_losses(output: Path, steps: int, numbers: List[int]) -> Dict[str, List[float]]:
    """The losses for each number of ranks, and for the floor."""
    runs = {f"{ranks}": losses(output, steps, ranks) for ranks in numbers}
    runs["1, reversed"] = losses(output, steps, 1, reverse=True)
    return runs


def differences(runs: Dict[str, List[float]]) -> Dict[str, List[float]]:
    """The relative difference of each run's losses from those on one rank."""
    one = runs["1"]
    return {
        name: [abs(a - b) / b for a, b in zip(values, one)]
        for name, values in runs.items()
        if name != "1"
    }


def main() -> None:
    """Run, print the table, write results/invariance.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=SHOWN[-1])
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks, 1 among them")
    args = parser.parse_args()
    steps, numbers = args.steps, [int(number) for number in args.ranks.split(",")]
    before = report.machine()
    with tempfile.TemporaryDirectory() as folder:
        runs = all_losses(Path(folder), steps, numbers)
    apart = differences(runs)
    rows = [
        (step, f"{runs['1'][step - 1]:.6f}", *(f"{apart[name][step - 1]:.1e}" for name in apart))
        for step in SHOWN
        if step <= steps
    ]
    head = ("step", "loss on 1 rank", *(f"{name}: relative difference" for name in apart))
    print(report.table(head, rows))
    print(report.write("invariance", {"losses": runs, "relative differences": apart}, before))


if __name__ == "__main__":
    main()

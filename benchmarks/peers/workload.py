"""The workload of every contender, and how it writes its results.

Standard library and NumPy alone: scripts of several environments import it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import time
from pathlib import Path
from typing import Iterator, Optional, Tuple

import numpy as np

LEARNING_RATE, MOMENTUM = 0.1, 0.9
MEAN, STD = 0.2860, 0.3530
WORKERS = 2  # processes of each rank's DataLoader
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def parse_args(description: str) -> argparse.Namespace:
    """The workload, from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, required=True, help="folder for RANK.json")
    parser.add_argument("--size", type=int, choices=(28, 96), default=28, help="of an image")
    parser.add_argument("--batch", type=int, default=64, help="samples on each rank")
    parser.add_argument("--steps", type=int, default=30, help="that are timed; 0: the first alone")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--width", type=int, default=64, help="channels of the net's first stage")
    parser.add_argument("--evaluate", action="store_true", help="time the test set instead")
    parser.add_argument("--settings", nargs="*", default=[], help="this project's: SETTING=VALUE")
    parser.add_argument("--split", action="store_true", help="Horovod's: split the test set too")
    parser.add_argument("--contiguous", action="store_true", help="PyTorch's: not channels_last")
    return parser.parse_args()


def read(folder: Path, split: str) -> Tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (N, 28, 28), and labels, int32 (N,), of unpacked IDX files."""
    images, labels = (np.fromfile(folder / name, np.uint8) for name in FILES[split])
    return images[16:].reshape(-1, 28, 28), labels[8:].astype(np.int32)


class Clock:
    """Notes when the first step was done, and times the steps after the warm-up."""

    def __init__(self, workload: argparse.Namespace, rank: int, ranks: int):
        self._workload, self._rank, self._ranks = workload, rank, ranks
        self._steps = 0
        self._first: Optional[float] = None
        self._began = 0.0

    @property
    def last_step(self) -> int:
        """Steps to make in all."""
        return self._workload.warmup + self._workload.steps

    def due(self) -> bool:
        """Count a step; whether the device has to be waited for, and :meth:`note` called."""
        self._steps += 1
        return self._steps in (1, self._workload.warmup, self.last_step)

    def note(self) -> bool:
        """The device has done all steps so far; whether they were the last."""
        now = time.time()
        self._first = self._first or now
        if self._steps == self._workload.warmup:
            self._began = now
        if self._steps < self.last_step:
            return False
        figures = {"first_step_at": self._first}
        if self._workload.steps:
            images = self._workload.batch * self._ranks * self._workload.steps
            figures["images_per_second"] = images / (now - self._began)
            figures["step_microseconds"] = 1e6 * (now - self._began) / self._workload.steps
        write_figures(self._workload, self._rank, **figures)
        return True


@contextlib.contextmanager
def timed(workload: argparse.Namespace, rank: int) -> Iterator[None]:
    """Write the seconds that the block took."""
    began = time.time()
    yield
    write_figures(workload, rank, seconds=time.time() - began)


def write_figures(workload: argparse.Namespace, rank: int, **figures: float) -> None:
    """Write this rank's figures, and the most memory that its process has held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    path = workload.out / f"{rank}.json"
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({**figures, "peak_mib": round(peak)}))
    partial.rename(path)

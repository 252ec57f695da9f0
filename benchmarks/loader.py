"""Compares the input pipeline with Gluon's DataLoader on the same transforms.

    python -m benchmarks.loader [--rounds 5] [--images 6400]

One epoch's worth of batches from the real training set is made by this project's loader (one
background thread, as in training) and by ``gluon.data.DataLoader`` with 0, 2 and 4 workers; at
28 x 28 with padding, random crop and flip, and at 96 x 96 with resizing. Each round times all of
them once; the results are medians over rounds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time
from typing import Any, Dict, Iterable, List

import mxnet as mx
import numpy as np
from mxnet import gluon
from mxnet.gluon.data.vision import transforms

from benchmarks import report
from trainer.config import Data
from trainer.data import fashion_mnist
from trainer.data.loader import TrainLoader
from trainer.dist.array_memory import on_device

BATCH = 64
OURS = "this project"
WORKERS = (0, 2, 4)


def ours(images: np.ndarray, labels: np.ndarray, settings: Data) -> Iterable[Any]:
    """This project's batches on the device, for one epoch."""
    loader = TrainLoader(
        images, labels, settings, global_batch_size=BATCH, seed=0, place=on_device(mx.cpu())
    )
    return loader.from_step(0, loader.steps_per_epoch)


def gluons(images: np.ndarray, labels: np.ndarray, size: int, workers: int) -> Iterable[Any]:
    """Gluon's batches, transformed as in its own examples."""
    steps = [transforms.ToTensor(), transforms.Normalize(Data().mean, Data().std)]
    if size == 28:
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))  # once, not timed
        steps = [RandomCrop(), transforms.RandomFlipLeftRight(), *steps]
    else:
        steps = [transforms.Resize(size), *steps]
    dataset = gluon.data.ArrayDataset(
        [mx.nd.array(image[:, :, None], dtype=np.uint8) for image in images],
        labels,
    ).transform_first(transforms.Compose(steps))
    return gluon.data.DataLoader(dataset, BATCH, shuffle=True, num_workers=workers)


class RandomCrop(gluon.Block):
    """A random 28 x 28 crop; MXNet 1.9.1's transforms have none without resizing."""

    def forward(self, image: mx.nd.NDArray) -> mx.nd.NDArray:
        return mx.image.random_crop(image, (28, 28))[0]


def speed(batches: Iterable[Any]) -> float:
    """Images a second, from the second batch on, without the start of workers."""
    images, began = 0, 0.0
    for number, batch in enumerate(batches):
        batch[0].wait_to_read()
        if number == 0:
            began = time.perf_counter()
        else:
            images += len(batch[0])
    return images / (time.perf_counter() - began)


def compare(
    images: np.ndarray, labels: np.ndarray, size: int, few: int, rounds: int
) -> Dict[str, List[float]]:
    """Images a second in each round, by loader; Gluon's are timed over the first ``few`` images."""
    settings = Data(pad_crop=2, flip=True) if size == 28 else Data(image_size=size)
    peers = {f"Gluon, {n} workers": gluons(images[:few], labels[:few], size, n) for n in WORKERS}
    speeds: Dict[str, List[float]] = {name: [] for name in (OURS, *peers)}
    for _ in range(rounds):
        speeds[OURS].append(speed(ours(images, labels, settings)))
        for name, batches in peers.items():
            speeds[name].append(speed(batches))
    return speeds


def main() -> None:
    """Measure, print the table, write results/loader.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=6_400, help="that Gluon's is timed over")
    args = parser.parse_args()
    before = report.machine()
    images, labels = fashion_mnist.load("train")
    figures: Dict[str, Any] = {}
    rows = []
    for size in (28, 96):
        speeds = compare(images, labels, size, args.images, args.rounds)
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        best = max(median for name, median in medians.items() if name != OURS)
        for name, median in medians.items():
            rows.append((f"{size} x {size}", name, f"{median:,.0f}", f"{median / best:.2f}"))
        figures[f"{size}x{size}"] = {
            "images_per_second": speeds,
            "medians": medians,
            "times_gluons_best": medians[OURS] / best,
        }
    print(report.table(("size", "loader", "images/s (median)", "times Gluon's best"), rows))
    print(report.write("loader", figures, before))


if __name__ == "__main__":
    main()

"""Compares the input pipeline with Gluon's DataLoader on the same transforms.

    python -m benchmarks.loader [--rounds 5] [--images 6400] [--pictures 400]

One epoch's worth of batches from the real training set is made by this project's loader (one
background thread, as in training) and by ``gluon.data.DataLoader`` with 0, 2 and 4 workers; at
28 x 28 with padding, random crop and flip, and at 96 x 96 with resizing. Each round times all of
them once; the results are medians over rounds.

Then JPEGs of 500 x 375 in a record file, cut at random to 224 x 224 and mirrored: this project
with two workers, MXNet's ``ImageRecordIter``, Gluon's ``DataLoader`` with two workers, PyTorch's
with two and Pillow if there is a .venv-bench (``make bench TORCH=1``), and the bare decoding by two
threads. Last, seconds and MiB to the first batch of a million records, in processes of their own.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterable, List

import mxnet as mx
import numpy as np
from mxnet import gluon
from mxnet.gluon.data.vision import transforms
from PIL import Image

from benchmarks import report
from trainer.config import Data
from trainer.data import fashion_mnist
from trainer.data.loader import TrainLoader
from trainer.data.pictures import decode
from trainer.data.sources import records
from trainer.data.sources.base import ArraySource
from trainer.dist.array_memory import on_device

BATCH = 64
SIDE = 224
OURS = "this project"
WORKERS = (0, 2, 4)
TORCH = Path(__file__).resolve().parents[1] / ".venv-bench" / "bin" / "python"


def ours(images: np.ndarray, labels: np.ndarray, settings: Data) -> Iterable[Any]:
    """This project's batches on the device, for one epoch."""
    loader = TrainLoader(
        ArraySource(images, labels),
        settings,
        global_batch_size=BATCH,
        seed=0,
        place=on_device(mx.cpu()),
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
        [mx.nd.array(image[:, :, None], dtype=np.uint8) for image in images], labels
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


def pictures(count: int, rounds: int) -> Dict[str, List[float]]:
    """Images a second of each in each round, over ``count`` JPEGs in a record file."""
    with tempfile.TemporaryDirectory() as folder:
        content = make_records(Path(folder), count)
        makers = {
            "bare decoding, 2 threads": lambda: bare_decoding(content),
            OURS: lambda: speed(our_pictures(Path(folder), count)),
            "ImageRecordIter": lambda: speed(record_iter(Path(folder))),
            "Gluon, 2 workers": lambda: speed(gluons_pictures(Path(folder))),
        }
        if TORCH.exists():
            makers["PyTorch and Pillow, 2 workers"] = lambda: torchs(content)
        speeds: Dict[str, List[float]] = {name: [] for name in makers}
        for _ in range(rounds):
            for name, measure in makers.items():
                speeds[name].append(measure())
    return speeds


def make_records(folder: Path, count: int) -> List[bytes]:
    """Write JPEGs that are as detailed as photographs; returns them."""
    draw = np.random.RandomState(0)
    writer = mx.recordio.MXIndexedRecordIO(
        str(folder / "train.idx"), str(folder / "train.rec"), "w"
    )
    made = []
    for number in range(count):
        shape = draw.randint(0, 256, (12, 16, 3)).astype(np.uint8)
        image = np.asarray(Image.fromarray(shape).resize((500, 375), Image.Resampling.BICUBIC))
        noisy = np.clip(image + draw.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(noisy).save(content, "JPEG", quality=85)
        made.append(content.getvalue())
        head = mx.recordio.IRHeader(0, number % 10, number, 0)
        writer.write_idx(number, mx.recordio.pack(head, made[-1]))
    writer.close()
    return made


def bare_decoding(content: List[bytes]) -> float:
    """Images a second that two threads decode, at full size, and nothing else."""

    def one(encoded: bytes) -> Any:
        return decode.decode(encoded, decode.header(encoded), channels=3)

    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, content))
    return len(content) / (time.perf_counter() - began)


def our_pictures(folder: Path, count: int) -> Iterable[Any]:
    """This project's batches of one epoch."""
    settings = Data(
        "records", folder=str(folder), image_size=SIDE, random_crop=True, flip=True, workers=2
    )
    loader = TrainLoader(
        records.find(settings)["train"],
        settings,
        global_batch_size=BATCH,
        seed=0,
        place=on_device(mx.cpu()),
    )
    return loader.from_step(0, count // BATCH)


def record_iter(folder: Path) -> Iterable[Any]:
    """MXNet's own reader of record files."""
    batches = mx.io.ImageRecordIter(
        path_imgrec=str(folder / "train.rec"),
        path_imgidx=str(folder / "train.idx"),
        data_shape=(3, SIDE, SIDE),
        batch_size=BATCH,
        shuffle=True,
        rand_mirror=True,
        random_resized_crop=True,
        min_random_area=0.08,
        max_random_area=1.0,
        max_aspect_ratio=4 / 3,
        min_aspect_ratio=3 / 4,
        preprocess_threads=2,
    )
    return (batch.data for batch in batches)


def gluons_pictures(folder: Path) -> Iterable[Any]:
    """Gluon's batches of the same records."""
    steps = [
        transforms.RandomResizedCrop(SIDE),
        transforms.RandomFlipLeftRight(),
        transforms.ToTensor(),
        transforms.Normalize(Data().mean, Data().std),
    ]
    dataset = gluon.data.vision.ImageRecordDataset(str(folder / "train.rec"))
    changed = dataset.transform_first(transforms.Compose(steps))
    return gluon.data.DataLoader(changed, BATCH, shuffle=True, num_workers=2)


def torchs(content: List[bytes]) -> float:
    """Images a second of PyTorch's loader over the same pictures, decoded by Pillow."""
    with tempfile.TemporaryDirectory() as folder:
        for number, encoded in enumerate(content):
            Path(folder, f"{number:06}.jpg").write_bytes(encoded)
        script = Path(__file__).with_name("peers") / "torch_pictures.py"
        options = map(str, (SIDE, BATCH, Data().mean, Data().std))
        return float(subprocess.check_output([TORCH, script, folder, *options]))


FIRST_BATCH = """
import sys, time
from trainer.config import Data
from trainer.data import input_pipeline
from trainer.data.loader import TrainLoader
from trainer.data.pictures.decode import opencv
opencv()
def kib(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
before, began = kib("VmRSS"), time.perf_counter()
settings = Data("records", folder=sys.argv[1], image_size=224, workers=2)
source = input_pipeline.read(settings).train
source.expect(1000)
source.digests()
loader = TrainLoader(source, settings, global_batch_size=64, seed=0)
next(loader.from_step(0, 1))
print(time.perf_counter() - began, (kib("VmHWM") - before) / 1024)
"""


def million(records: int, rounds: int) -> Dict[str, List[float]]:
    """Seconds and MiB of the start, from the index to the first batch, in each round."""
    with tempfile.TemporaryDirectory() as folder:
        make_records(Path(folder), BATCH)
        index = Path(folder) / "train.idx"
        offsets = [line.split("\t")[1] for line in index.read_text().splitlines()]
        lines = (f"{number}\t{offsets[number % BATCH]}\n" for number in range(records))
        index.write_text("".join(lines))
        command = [sys.executable, "-c", FIRST_BATCH, folder]
        found = [subprocess.check_output(command, text=True).split() for _ in range(rounds)]
    seconds, mebibytes = zip(*(map(float, line) for line in found))
    return {"seconds": [*seconds], "MiB": [*mebibytes]}


def main() -> None:
    """Measure, print the table, write results/loader.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=6_400, help="that Gluon's is timed over")
    parser.add_argument("--pictures", type=int, default=640, help="JPEGs; 0: none")
    parser.add_argument("--records", type=int, default=1_000_000, help="in an index; 0: none")
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
    if args.pictures:
        speeds = pictures(args.pictures, args.rounds)
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        figures["jpegs of 500x375 to 224x224"] = {"images_per_second": speeds, "medians": medians}
        pairs = [(n, f"{m:,.0f}", f"{medians[OURS] / m:.2f}") for n, m in medians.items()]
        print(
            report.table(("JPEGs to 224 x 224", "images/s (median)", "this project over it"), pairs)
        )
    if args.records:
        first = million(args.records, args.rounds)
        medians = {what: statistics.median(values) for what, values in first.items()}
        figures["first batch of records"] = {**first, "medians": medians, "records": args.records}
        row = [f"{args.records:,}", f"{medians['seconds']:.2f}", f"{medians['MiB']:.0f}"]
        print(report.table(("records", "seconds to the first batch", "MiB"), [row]))
    print(report.write("loader", figures, before))


if __name__ == "__main__":
    main()

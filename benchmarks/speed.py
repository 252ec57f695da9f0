"""Compares the speed of this project to its alternatives: ``make bench``, or

    python -m benchmarks.speed [--only training_28,first_step] [--rounds 5]

Every measurement is a new job with one OpenMP thread per rank; contenders alternate, and results
are medians over rounds. Each experiment writes ``results/speed_*.json``; the table over all of them
goes into ``docs/performance.md``. ``contenders.py`` runs what is in ``peers/``.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import statistics
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional

from benchmarks import report
from benchmarks.contenders import (
    HOROVODRUN,
    OWN_LAUNCHER,
    TORCHRUN,
    Contender,
    Figures,
    horovod_gluon,
    ours,
    over_hosts,
    peer,
    retried,
    side_by_side,
    torch,
    torch_over_hosts,
)
from tests.integration.hosts import why_not
from trainer.data import fashion_mnist

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"

OURS, GLUON, BOOK, TORCH = "this project", "Horovod + Gluon", "d2lzh", "PyTorch DDP"
TORCH_LAST = f"{TORCH}, channels_last"
BOOK_THREADS = f"{BOOK}, all threads"

Contenders = Dict[str, Contender]

SIZE_28 = ("--size=28", "--steps=40")
EPOCH = ("--size=28", "--steps=463")  # after 5 of warm-up: all whole batches of 128
SIZE_96 = ("--size=96", "--steps=30", "--warmup=2")
ONE_STEP = ("--steps=0", "--warmup=1")
NARROW = ("--size=28", "--steps=300", "--width=1", "--batch=2")  # kernels cost next to nothing
SILENT = ("monitor.loggers=[]", "monitor.every_steps=1000000")

SHARED = f"{OURS}, in shared memory"
ALONE = f"{OURS}, no network"
HALF, SYNC, FLAT = f"{OURS}, float16", f"{OURS}, sync", f"{OURS}, rank by rank"
LAYOUTS = {"10gbit": ("10gbit", 2, 1), "1gbit": ("1gbit", 2, 1), "2x2": ("10gbit", 2, 2)}


def hosts(rate: str, count: int, ranks: int) -> Contenders:
    """Ranks on hosts of this machine, with 128 images in all, on a throttled network."""
    size = ("--size=28", "--steps=20", f"--batch={128 // (count * ranks)}")
    layout = (ranks,) * count
    gluon = over_hosts(rate, layout, *size, module="horovod_gluon")
    settings = {HALF: "optimizer.fp16_allreduce=true", SYNC: "batch_norm=sync"}
    if ranks > 1:
        settings[FLAT] = "optimizer.shared_memory=false"
    return {
        OURS: over_hosts(rate, layout, *size),
        TORCH: torch_over_hosts(rate, count, ranks, *size, "--contiguous"),
        GLUON: retried(gluon),
        ALONE: side_by_side(*size, jobs=count * ranks),  # the limit
        **{
            name: over_hosts(rate, layout, *size, "--settings", setting)
            for name, setting in settings.items()
        },
    }


EXPERIMENTS: Dict[str, Contenders] = {
    "training_28": {
        OURS: ours(*SIZE_28),
        GLUON: horovod_gluon(*SIZE_28),
        TORCH: torch(*SIZE_28, "--contiguous"),
        TORCH_LAST: torch(*SIZE_28),
        BOOK: peer("d2l_train_ch5", [], *SIZE_28),
    },
    "epoch_28": {
        OURS: ours(*EPOCH),
        GLUON: horovod_gluon(*EPOCH),
        TORCH: torch(*EPOCH, "--contiguous"),
    },
    "training_96": {
        OURS: ours(*SIZE_96),
        GLUON: horovod_gluon(*SIZE_96),
        TORCH: torch(*SIZE_96, "--contiguous"),
        TORCH_LAST: torch(*SIZE_96),
        BOOK: peer("d2l_train_ch5", [], *SIZE_96),
        BOOK_THREADS: peer("d2l_train_ch5", [], *SIZE_96, OMP_NUM_THREADS="2"),
    },
    "scaling": {
        "2 ranks": ours(*SIZE_28),
        "2 x 1 rank": side_by_side(*SIZE_28),
        f"{TORCH}, 2 ranks": torch(*SIZE_28),
        f"{TORCH}, 2 x 1 rank": torch(*SIZE_28, ranks=1, jobs=2),
    },
    "batch_norm": {
        "local": ours(*SIZE_28),
        "sync": ours(*SIZE_28, "--settings", "batch_norm=sync"),
    },
    # What Python and the libraries take of a step; gradients go through Horovod, at its own cycle,
    # as on GPUs.
    "host_time": {
        OURS: peer(
            "this_project",
            HOROVODRUN,
            *NARROW,
            "--settings",
            "optimizer.shared_memory=false",
            HOROVOD_CYCLE_TIME="1",
        ),
        SHARED: ours(*NARROW),
        GLUON: horovod_gluon(*NARROW),
        TORCH: torch(*NARROW, "--contiguous"),
    },
    "first_step": {
        OURS: ours(*ONE_STEP),
        "its own launcher": ours(*ONE_STEP, launcher=OWN_LAUNCHER),
        GLUON: horovod_gluon(*ONE_STEP),
    },
    "evaluation": {
        OURS: ours("--evaluate"),
        GLUON: horovod_gluon("--evaluate"),
        f"{GLUON}, split": horovod_gluon("--evaluate", "--split"),
    },
    **{f"hosts_{name}": hosts(*layout) for name, layout in LAYOUTS.items()},
    # What optimizer.bucket_mb is chosen by; no rows of the table.
    **{
        f"buckets_{rate}": {
            f"{size} MB": over_hosts(
                rate, (1, 1), *SIZE_28, "--settings", f"optimizer.bucket_mb={size}"
            )
            for size in (1, 2, 4, 8, 16, 100)
        }
        for rate in ("10gbit", "1gbit")
    },
    "monitor": {"on": ours("--steps=100"), "off": ours("--steps=100", "--settings", *SILENT)},
}


class Row(NamedTuple):
    """A row of the table: the ratio ``one`` / ``other``, compared to an aim if there is one."""

    title: str
    experiment: str
    figure: str
    one: str
    other: str
    aim: Optional[float]
    at_most: bool = False


ROWS = [
    Row("training, 28 x 28, images/s", "training_28", "images_per_second", OURS, GLUON, 1.5),
    Row("", "training_28", "images_per_second", OURS, TORCH, 1.15),
    Row("", "training_28", "images_per_second", OURS, TORCH_LAST, 1.15),
    Row("a whole epoch, 28 x 28, images/s", "epoch_28", "images_per_second", OURS, GLUON, 1.5),
    Row("", "epoch_28", "images_per_second", OURS, TORCH, 1.15),
    Row("training, 96 x 96, images/s", "training_96", "images_per_second", OURS, GLUON, 1.2),
    Row("", "training_96", "images_per_second", OURS, TORCH, 1.1),
    Row("", "training_96", "images_per_second", OURS, TORCH_LAST, 1.1),
    Row("", "training_96", "images_per_second", OURS, BOOK, 2),
    # Aims apply to one thread per rank.
    Row("", "training_96", "images_per_second", OURS, BOOK_THREADS, None),
    Row("scaling, images/s", "scaling", "images_per_second", "2 ranks", "2 x 1 rank", 0.95),
    # What the same machine does to another synchronous trainer.
    Row("", "scaling", "images_per_second", f"{TORCH}, 2 ranks", f"{TORCH}, 2 x 1 rank", None),
    Row("batch norm, images/s", "batch_norm", "images_per_second", "local", "sync", 1.15, True),
    Row("host time of a step, µs", "host_time", "step_microseconds", OURS, TORCH, 0.75, True),
    Row("", "host_time", "step_microseconds", OURS, GLUON, None),
    Row("", "host_time", "step_microseconds", SHARED, TORCH, None),
    Row("command to first step, s", "first_step", "first_step", OURS, GLUON, 1, at_most=True),
    Row("", "first_step", "first_step", "its own launcher", GLUON, 1, at_most=True),
    Row("10,000 test images, s", "evaluation", "seconds", OURS, GLUON, 1 / 1.3, at_most=True),
    Row("", "evaluation", "seconds", OURS, f"{GLUON}, split", 1 / 1.3, at_most=True),
    Row("a rank's peak memory, 28 x 28, MiB", "training_28", "peak_mib", OURS, TORCH, 1, True),
    Row("a rank's peak memory, 96 x 96, MiB", "training_96", "peak_mib", OURS, TORCH, 1, True),
    *(
        Row(*row)
        for name, title, over_torch, over_gluon, half, synced in (
            ("10gbit", "2 hosts, 10 Gbit/s, images/s", 1.3, 1.5, None, 1.15),
            ("1gbit", "2 hosts, 1 Gbit/s, images/s", 1.15, None, 1.6, None),
            ("2x2", "2 hosts x 2 ranks, 10 Gbit/s, images/s", 1.4, None, None, 1.25),
        )
        for row in (
            (title, f"hosts_{name}", "images_per_second", OURS, TORCH, over_torch),
            ("", f"hosts_{name}", "images_per_second", OURS, GLUON, over_gluon),
            ("", f"hosts_{name}", "images_per_second", ALONE, TORCH, None),
            ("", f"hosts_{name}", "images_per_second", HALF, TORCH, half),
            ("", f"hosts_{name}", "images_per_second", HALF, OURS, 1.0),
            ("", f"hosts_{name}", "images_per_second", OURS, SYNC, synced, True),
        )
    ),
    Row("progress, logging and monitor", "monitor", "images_per_second", "on", "off", 0.99),
]


def main() -> None:
    """Run the chosen experiments, print the table and insert it into the docs."""
    parser = argparse.ArgumentParser(description="This project beside what a user would pick.")
    parser.add_argument("--only", help=f"of {','.join(EXPERIMENTS)}, with commas between")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(EXPERIMENTS)
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"no experiment {unknown[0]}; there are {', '.join(EXPERIMENTS)}")
    with unpacked_data() as data:
        for name in names:
            before = report.machine()
            if name.startswith(("hosts", "buckets")) and why_not():
                print(f"skipped: {name}, as {why_not()}")
                continue
            rounds = alternate(name, runnable(EXPERIMENTS[name]), data, args.rounds)
            report.write(f"speed_{name}", {"rounds": rounds, "medians": medians(rounds)}, before)
    print(table())
    report.include(PAGE, "benchmarks.speed", table())


@contextlib.contextmanager
def unpacked_data() -> Iterator[Path]:
    """A folder with the four files of Fashion-MNIST, uncompressed."""
    source = fashion_mnist.find_or_download()
    with tempfile.TemporaryDirectory() as folder:
        for path in source.glob("*-ubyte*"):
            packed = path.suffix == ".gz"
            content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
            Path(folder, path.stem if packed else path.name).write_bytes(content)
        yield Path(folder)


def runnable(contenders: Contenders) -> Contenders:
    """The contenders installed on this machine; prints which are skipped, and why."""
    if TORCHRUN.exists():
        return contenders
    print(f"skipped: {TORCH}, as there is no .venv-bench; `make bench TORCH=1` makes it")
    return {name: run for name, run in contenders.items() if not name.startswith(TORCH)}


def alternate(
    experiment: str, contenders: Contenders, data: Path, rounds: int
) -> List[Dict[str, Figures]]:
    """Measure the contenders in turn, round after round."""
    taken: List[Dict[str, Figures]] = []
    for number in range(1, rounds + 1):
        taken.append({})
        for name, run in contenders.items():
            taken[-1][name] = {key: round(value, 3) for key, value in run(data).items()}
            print(f"{experiment}, round {number}, {name}: {taken[-1][name]}", flush=True)
    return taken


def medians(rounds: List[Dict[str, Figures]]) -> Dict[str, Figures]:
    """The median over rounds of each contender's results."""
    return {
        name: {key: statistics.median(taken[name][key] for taken in rounds) for key in figures}
        for name, figures in rounds[0].items()
    }


def table() -> str:
    """The table of all rows that have been measured, in Markdown."""
    head = ("", "", "", "compared with", "", "ratio", "target", "", "measured")
    cells = [cell for cell in map(cells_of, ROWS) if cell]
    return report.table(head, cells)


def cells_of(row: Row) -> Optional[List[str]]:
    """One row of the table; None if its experiment has not been run with both contenders."""
    path = report.RESULTS / f"speed_{row.experiment}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    found = record["figures"]["medians"]
    if row.one not in found or row.other not in found:
        return None
    one, other = (found[name][row.figure] for name in (row.one, row.other))
    ratio = one / other
    aim, verdict = "", ""
    if row.aim is not None:
        aim = f"{'at most' if row.at_most else 'at least'} {row.aim:.2f}"
        met = ratio <= row.aim if row.at_most else ratio >= row.aim
        verdict = "met" if met else "**missed**"
    return [
        row.title,
        row.one,
        f"{one:.{0 if one > 99 else 1}f}",
        row.other,
        f"{other:.{0 if other > 99 else 1}f}",
        f"{ratio:.2f}",
        aim,
        verdict,
        f"{record['date']}, {record['machine']['cpu']}",
    ]


if __name__ == "__main__":
    main()

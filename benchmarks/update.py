"""The update of ResNet-18's weights by MXNet's kernels and by this project's, in milliseconds.

python -m launch local -n 2 --quiet -- python -m benchmarks.update

All ranks update at once, as in training, and the ways alternate. Each rank's median goes into
``results/update.json`` and ``docs/notes/performance.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import mxnet as mx

from benchmarks import report
from trainer import dist
from trainer.dist import device
from trainer.model import resnet18
from trainer.step import momentum

PAGE = Path(__file__).resolve().parents[1] / "docs" / "notes" / "performance.md"

SETTINGS = {"learning_rate": 0.1, "momentum": 0.9, "wd": 1e-4}


def ours(kind: Any, may_wait: bool) -> mx.optimizer.Optimizer:
    """This project's optimizer, with its own loop in C++ or by the kernels it takes of MXNet's."""
    optimizer = kind(**SETTINGS)
    optimizer.may_wait = may_wait
    return optimizer


WAYS: Dict[str, Callable[[], mx.optimizer.Optimizer]] = {
    "SGD, MXNet": lambda: mx.optimizer.SGD(**SETTINGS),
    "SGD, single-array kernels": lambda: ours(momentum.SGD, False),
    "SGD, C++": lambda: ours(momentum.SGD, True),
    "NAG, MXNet": lambda: mx.optimizer.NAG(**SETTINGS),
    "NAG, C++": lambda: ours(momentum.NAG, True),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    device.share_cores()
    dist.init()
    before = report.machine()
    net = resnet18()
    net.initialize()
    net(mx.nd.zeros((1, 1, 28, 28)))
    trained = [p for p in net.collect_params().values() if p.grad_req != "null"]
    trainers = {
        name: mx.gluon.Trainer(trained, make(), kvstore=None) for name, make in WAYS.items()
    }
    seconds: Dict[str, List[float]] = {name: [] for name in WAYS}
    for _ in range(rounds + 1):
        for name, trainer in trainers.items():
            mx.nd.waitall()
            dist.barrier()
            began = time.perf_counter()
            for parameter in trained:
                parameter.data()._fresh_grad = True  # as after a backward
            trainer.update(1)
            mx.nd.waitall()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: 1e3 * statistics.median(taken[1:]) for name, taken in seconds.items()}
    of_ranks = dist.gather_objects(medians)
    if dist.is_root():
        figures = {name: [round(rank[name], 2) for rank in of_ranks] for name in WAYS}
        report.write("update", figures, before)
        print(table())
        report.include(PAGE, "benchmarks.update", table())


def table() -> str:
    """What was measured last, a row for each way."""
    figures = json.loads((report.RESULTS / "update.json").read_text())["figures"]
    ranks = len(next(iter(figures.values())))
    heads = ["ms", *(f"rank {rank}" for rank in range(ranks))]
    return report.table(heads, [[name, *taken] for name, taken in figures.items()])


if __name__ == "__main__":
    main()

"""Measures how much slower training steps are while a checkpoint is being written.

    horovodrun -np 2 python -m benchmarks.saving

The seed's ResNet at 1 x 28 x 28, SGD with momentum (85 MB per checkpoint), gradients averaged over
ranks; checkpoints go to a temporary folder below ``--folder``. A round makes some ordinary steps,
begins a save, and steps until it has ended; then it saves once more synchronously, for comparison.
A save costs the run the time to copy its arrays, plus the slowdown of the steps during it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, List

import mxnet as mx
import numpy as np

from benchmarks import report
from trainer import checkpoint, dist
from trainer.checkpoint.saver import Saver
from trainer.config import Config
from trainer.data.loader import Batch
from trainer.dist import device
from trainer.model import resnet18
from trainer.step.optimizer import make_trainer
from trainer.step.step import train_step

STATE = checkpoint.RunState()


def milliseconds(work: Callable[[], Any]) -> float:
    """The duration of ``work``, including what it enqueues on the device."""
    start = time.perf_counter()
    work()
    mx.nd.waitall()
    return 1000 * (time.perf_counter() - start)


class Rounds:
    """Measures rounds on rank 0, in milliseconds; other ranks make the same steps."""

    def __init__(self, batch: int, folder: Path):
        mx.random.seed(0)
        self._config = Config()
        self._net = resnet18()
        self._net.initialize(mx.init.Xavier())
        random = np.random.RandomState(dist.rank())
        data = mx.nd.array(random.normal(size=(batch, 1, 28, 28)))
        label = mx.nd.array(random.randint(0, 10, batch))
        self._batch = Batch(data, label, batch, batch * dist.world_size())
        self._net(data)
        self._net.hybridize(static_alloc=True)
        self._trainer = make_trainer(self._net, self._config.optimizer)
        self._saver = Saver(folder, 1, print)
        self.usual: List[float] = []
        self.beside: List[float] = []
        self.copying: List[float] = []
        self.under_way: List[float] = []
        self.waiting: List[float] = []

    def step(self) -> float:
        dist.barrier()
        return milliseconds(lambda: train_step(self._net, self._trainer, self._batch, self._config))

    def make(self, steps: int) -> None:
        """Make one round with ``steps`` ordinary steps."""
        self.usual += [self.step() for _ in range(steps)]
        began = time.perf_counter()
        self.copying.append(milliseconds(self._begin))
        while dist.any_rank(self._saver.under_way, "under_way"):
            self.beside.append(self.step())
        self.under_way.append(1000 * (time.perf_counter() - began))
        self._saver.wait()
        self.step()
        self.waiting.append(milliseconds(lambda: (self._begin(), self._saver.wait())))
        dist.barrier()

    def _begin(self) -> None:
        if dist.is_root():
            content = checkpoint.snapshot(self._net, self._trainer, STATE)
            self._saver.begin(content)


def main() -> None:
    """Measure, print the table, write results/saving.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="samples on each rank")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--folder", help="on the disk that is meant; default: the system's own")
    args = parser.parse_args()
    before = report.machine()
    dist.init(steps_in_memory=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rounds = Rounds(args.batch, Path(folder))
        for _ in range(3):
            rounds.step()  # the first steps compile and allocate
        for _ in range(args.rounds):
            rounds.make(steps=3)
        figures = {
            name: {"median ms": round(statistics.median(taken), 1), "times": len(taken)}
            for name, taken in (
                ("a step as usual", rounds.usual),
                ("a step beside a save", rounds.beside),
                ("copying the arrays", rounds.copying),
                ("from beginning a save to its end", rounds.under_way),
                ("a save that training waits for", rounds.waiting),
            )
        }
    usual, beside = (statistics.median(taken) for taken in (rounds.usual, rounds.beside))
    if dist.is_root():
        print(f"{dist.world_size()} ranks, {args.batch} samples each")
        rows = [[name, *figure.values()] for name, figure in figures.items()]
        print(report.table(["what", "median ms", "times"], rows))
        print(f"a step beside a save takes {beside / usual:.3f} times the usual")
        print(report.write("saving", {"ratio": round(beside / usual, 3), **figures}, before))
    dist.shutdown()


if __name__ == "__main__":
    device.share_cores()
    main()

"""Measures the cost of monitoring: steps with and without a report to TensorBoard.

    python -m launch local -n 2 --quiet -- python -m benchmarks.monitor

The seed's ResNet at 1 x 28 x 28, on ranks of one machine, SGD with momentum. Every second block of
steps does all that the trainer's loop does for a report: it times the parts of one step, computes
the gradient norm of the last, reads loss and accuracy, checks the weights, gathers the ranks'
times, reads rank 0's machine and writes the points. The other blocks do none of it. Blocks
alternate, so that other load on the machine affects both. The cost of a report does not depend on
the number of steps before it, so blocks are short, for a better signal, and the cost is given as a
share of the default interval. The time for histograms and pictures, once per epoch, is measured
as well.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from typing import Dict, List, Optional, Sequence, Tuple

import mxnet as mx
import numpy as np

from benchmarks import report
from trainer import dist
from trainer.config import Config, Monitor, from_dict
from trainer.data.loader import Batch
from trainer.dist import device
from trainer.model import prepare, resnet18
from trainer.report.figures import Predicted
from trainer.report.report import Report
from trainer.step.evaluation import THRESHOLDS, Evaluation
from trainer.step.metrics import TrainMetrics
from trainer.step.optimizer import make_trainer
from trainer.step.step import train_step
from trainer.step.timing import Timing


class Work:
    """A net in training, in blocks of steps."""

    def __init__(self, config: Config, samples: int):
        self.config, self.net, self.step = config, resnet18(), 0
        prepare.prepare_net(self.net, config, (1, 28, 28), mx.cpu())
        self.trainer = make_trainer(self.net, config.optimizer)
        parameters = self.net.collect_params().values()
        self.metrics = TrainMetrics(mx.cpu(), parameters=parameters)
        random = np.random.RandomState(dist.rank())
        self.batch = Batch(
            mx.nd.array(random.normal(size=(samples, 1, 28, 28))),
            mx.nd.array(random.randint(0, 10, samples)),
            samples,
            samples * dist.world_size(),
        )

    def block(self, timing: Timing, reporter: Optional[Report]) -> float:
        """Milliseconds of ``monitor.every_steps`` steps, and of a report if there is a reporter."""
        steps = self.config.monitor.every_steps
        start = time.perf_counter()
        for number in range(1, steps + 1):
            mark, norm = timing.of(self.step), reporter is not None and number == steps
            result = train_step(self.net, self.trainer, self.batch, self.config, norm, mark)
            self.metrics.add(self.step, result, self.batch.samples)
            self.step += 1
        if reporter is not None:
            means, times = self.metrics.read(), timing.read()
            reporter.training(self.step, means, 0.1, result.gradient_norm, 1.0, times)
        mx.nd.waitall()
        return 1000 * (time.perf_counter() - start)


def once_an_epoch(work: Work, reporter: Report) -> Dict[str, float]:
    """Milliseconds for what is written once per epoch, with made-up values."""
    confusion, counts = np.ones((10, 10), np.int64), np.ones((2, 10, THRESHOLDS), np.int64)
    images, labels = np.zeros((32, 28, 28), np.uint8), np.zeros(32, int)
    shown = Predicted(images, labels, labels)
    seen = Evaluation(1.0, 1.0, confusion, 100, counts)
    reporter.evaluation(1, seen, "test", shown)  # loads Matplotlib
    taken = {}
    for name, write in (
        ("histograms", lambda: reporter.parameters(work.step, work.net, work.trainer)),
        ("test figures", lambda: reporter.evaluation(work.step, seen, "test", None)),
        ("test figures and images", lambda: reporter.evaluation(work.step, seen, "test", shown)),
    ):
        start = time.perf_counter()
        write()
        taken[name] = round(1000 * (time.perf_counter() - start), 1)
    return taken


def around_median(values: Sequence[float]) -> Tuple[float, float]:
    """The 95 % confidence interval of the median, from order statistics at binomial bounds."""
    ordered, count = sorted(values), len(values)
    reach = 1.96 * math.sqrt(count) / 2
    lower = max(0, math.floor(count / 2 - reach) - 1)
    return ordered[lower], ordered[min(count - 1, math.ceil(count / 2 + reach))]


def measure(
    config: Config, samples: int, blocks: int
) -> Tuple[Dict[str, List[float]], Dict[str, float]]:
    """Milliseconds of each block, by kind, and of what is written once per epoch."""
    work = Work(config, samples)
    reporter = Report(config, 10**6, 0, 10**9, [str(label) for label in range(10)])
    kinds = {
        "without": (Timing(None, 0), None),
        "with": (Timing(config.monitor.every_steps, 0), reporter),
    }
    taken: Dict[str, List[float]] = {kind: [] for kind in kinds}
    for number in range(blocks + 1):
        for kind, monitoring in kinds.items():
            milliseconds = work.block(*monitoring)
            if number:  # the first of each warms up
                taken[kind].append(milliseconds)
    epoch = once_an_epoch(work, reporter)
    reporter.close()
    return taken, epoch


def main() -> None:
    """Measure, print the cost of a report, write results/monitor.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="samples on each rank")
    parser.add_argument("--blocks", type=int, default=80, help="of each kind")
    parser.add_argument("--steps", type=int, default=5, help="of a block")
    args = parser.parse_args()
    before = report.machine()
    dist.init()
    with tempfile.TemporaryDirectory() as folder:
        config = from_dict({"output": folder, "monitor": {"every_steps": args.steps}})
        config.folder.mkdir()
        taken, epoch = measure(config, args.batch, args.blocks)
    step = statistics.median(taken["without"]) / args.steps
    interval = Monitor().every_steps
    costs = [b - a for a, b in zip(taken["without"], taken["with"])]
    cost, low, high = (round(v, 1) for v in (statistics.median(costs), *around_median(costs)))
    share = 100 / (interval * step)
    figures = {
        "ranks": dist.world_size(),
        "samples on each rank": args.batch,
        "steps of a block": args.steps,
        "milliseconds a step, without": round(step, 1),
        "milliseconds a reading costs, median of pairs": cost,
        "its confidence interval of 95 %": [low, high],
        f"percent of {interval} steps": round(cost * share, 2),
        "its confidence interval, percent": [round(low * share, 2), round(high * share, 2)],
        "milliseconds, each pair": [round(value, 1) for value in costs],
        "milliseconds once an epoch": epoch,
    }
    if dist.is_root():
        path = report.write("monitor", figures, before)
        print(
            f"a reading costs {cost} ms ({low} to {high}; median of {len(costs)} pairs), "
            f"{cost * share:.2f} % ({low * share:.2f} to {high * share:.2f}) of {interval} steps "
            f"of {step:.1f} ms; once an epoch, ms: {epoch}; {path}"
        )
    dist.shutdown()


if __name__ == "__main__":
    device.share_cores()
    main()

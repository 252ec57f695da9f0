"""Times a training step with local, group and sync batch norm, on ranks of one machine.

    horovodrun -np 2 python -m benchmarks.batch_norm

The seed's ResNet at 1 x 28 x 28, SGD with momentum, gradients averaged over ranks. Each process
holds one net per kind of batch norm and steps them in turn, so that other load on the machine
affects all alike. With all ranks on one node, group and sync do the same work. ``--forms
hybridized`` omits the imperative nets; ``--through horovod`` reduces statistics by Horovod instead
of through shared memory. The latency of one small allreduce is measured both ways.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time
from typing import Any, Callable, Dict, List, Tuple

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from benchmarks import report
from trainer import batch_norm, dist
from trainer.batch_norm.rank_sum import RankSum
from trainer.model import resnet18
from trainer.step.optimizer import gluon_trainer

IN_PYTHON = "sync, in Python"  # the operator used where the one in C++ cannot be
WAYS = ("local", "group", "sync", IN_PYTHON)
FORMS = ("imperative", "hybridized")
LATENCIES = ("shared memory", "horovod")
Seconds = Tuple[float, float]  # wall time, CPU time of this process


def step_of(way: str, hybridize: bool, batch: int) -> Callable[[], Seconds]:
    """A function that makes one training step and returns its wall and CPU time."""
    mx.random.seed(0)
    net = resnet18()
    net.initialize(mx.init.Xavier())
    random = np.random.RandomState(dist.rank())
    data = mx.nd.array(random.normal(size=(batch, 1, 28, 28)))
    label = mx.nd.array(random.randint(0, 10, batch))
    net(data)
    if way != "local":
        ranks = dist.node_process_set() if way == "group" else None
        batch_norm.convert_sync_batch_norm(net, process_set=ranks)
    if hybridize:
        net.hybridize(static_alloc=True)
    loss_function = gluon.loss.SoftmaxCrossEntropyLoss()
    sgd = mx.optimizer.create("sgd", learning_rate=0.01, momentum=0.9)
    trainer = gluon_trainer(net.collect_params(), sgd)

    def step() -> Seconds:
        os.environ["BATCH_NORM_NATIVE"] = str(int(way != IN_PYTHON))  # the first step decides
        clock, processor = time.perf_counter(), time.process_time()
        with autograd.record():
            loss = loss_function(net(data), label)
        loss.backward()
        trainer.step(batch)
        mx.nd.waitall()
        return time.perf_counter() - clock, time.process_time() - processor

    return step


def measure(hybridize: bool, batch: int, rounds: int) -> Dict[str, Any]:
    """Medians over rounds, in milliseconds; ratios are medians of each round's ratio to local."""
    steps = {way: step_of(way, hybridize, batch) for way in WAYS}
    taken: Dict[str, List[Seconds]] = {way: [] for way in WAYS}
    for number in range(rounds + 2):
        for way, step in steps.items():
            seconds = step()
            if number >= 2:  # the first two warm up
                taken[way].append(seconds)
    figures = {}
    for way in WAYS:
        clock, processor = ([1000 * s[i] for s in taken[way]] for i in range(2))
        ratios = [own[0] / local[0] for own, local in zip(taken[way], taken["local"])]
        figures[way] = {
            "milliseconds": round(statistics.median(clock), 1),
            "fastest": round(min(clock), 1),
            "processor milliseconds": round(statistics.median(processor), 1),
            "ratio": round(statistics.median(ratios), 3),
        }
    return figures


def microseconds_of_a_sum(shared: bool, calls: int = 300) -> float:
    """Median latency of an allreduce of 129 numbers, as 64 channels need, one after another."""
    rank_sum, values, taken = RankSum(None), np.ones(129), []
    if not shared:
        rank_sum._connected = True  # without shared memory it uses Horovod
    for _ in range(calls):
        start = time.perf_counter()
        rank_sum(values)
        taken.append(time.perf_counter() - start)
    return round(1e6 * statistics.median(taken))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="samples on each rank")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--through", choices=("shared-memory", "horovod"), default="shared-memory")
    args = parser.parse_args()
    before = report.machine()
    dist.init()
    if args.through == "horovod":
        RankSum._share = lambda self, *_: None  # type: ignore[method-assign]
    latency = {way: microseconds_of_a_sum(way == "shared memory") for way in LATENCIES}
    figures = {form: measure(form == "hybridized", args.batch, args.rounds) for form in args.forms}
    if dist.is_root():
        rows = [
            [form, way, *figures[form][way].values()] for form in figures for way in figures[form]
        ]
        head = ["form", "batch norm", "ms", "fastest", "processor ms", "times local"]
        print(f"{dist.world_size()} ranks, {args.batch} samples each, {args.through}")
        print(report.table(head, rows))
        print("one sum, microseconds:", latency)
        name = "batch_norm" if args.through == "shared-memory" else "batch_norm_horovod"
        report.write(name, {"ranks": dist.world_size(), "sum": latency, **figures}, before)
    dist.shutdown()


if __name__ == "__main__":
    main()

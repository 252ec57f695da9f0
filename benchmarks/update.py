"""The update of ResNet-18's weights by MXNet's kernels and by this project's, in milliseconds.

python -m launch local -n 2 --quiet -- python -m benchmarks.update

All ranks update at once, as in training, the ways alternate, and rank 0 prints each rank's median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, Callable, Dict, List

import mxnet as mx

from trainer import device, dist, momentum
from trainer.model import resnet18

SETTINGS = {
    "learning_rate": 0.1,
    "momentum": 0.9,
    "wd": 1e-4,
}


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
        for name in WAYS:
            print(f"{name:<26}", *(f"{rank[name]:6.1f}" for rank in of_ranks), flush=True)


if __name__ == "__main__":
    main()

"""A CPU rank for benchmarks/prove_gpu.py: how its gradients (40 MB) are added up."""

from __future__ import annotations

import os
import statistics
import time

import mxnet as mx
from mxnet.gluon import nn

from trainer import dist
from trainer.config import Optimizer
from trainer.mxnet_internals import allreduce_of
from trainer.step.optimizer import make_trainer


def main() -> None:
    dist.init(steps_in_memory=True)
    net = nn.Dense(3162, in_units=3162)
    net.initialize()
    trainer = make_trainer(net, Optimizer(lr=0.1))
    seconds = []
    for _ in range(12):
        with mx.autograd.record():
            loss = net(mx.nd.ones((1, 3162))).sum()
        loss.backward()
        mx.nd.waitall()
        start = time.perf_counter()
        trainer.allreduce_grads()
        mx.nd.waitall()
        seconds.append(time.perf_counter() - start)
    shared = getattr(allreduce_of(trainer), "_shared", None) is not None
    if dist.is_root():
        way = "in shared memory" if shared else "by Horovod"
        cycle = os.environ.get("HOROVOD_CYCLE_TIME")
        took = 1e3 * statistics.median(seconds)
        print(f"gradients are added up {way} in {took:.1f} ms; Horovod's cycle: {cycle} ms")
    dist.shutdown()


if __name__ == "__main__":
    main()

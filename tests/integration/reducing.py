"""A rank of test_gradients_over_hosts.py: reduces gradients, and says what it finds, as JSON.

One line for float32 on the wire, one for float16. Argument: how often.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Dict

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import nn

from trainer import dist
from trainer.config import Optimizer
from trainer.mxnet_internals import allreduce_of
from trainer.step.gradients import mean_gradients, reduce_and_update
from trainer.step.optimizer import make_trainer

WIDE = 300


def sent() -> int:
    """Bytes that this host has sent."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("eth0"))


def backward(net: nn.HybridSequential, seed: int) -> None:
    data = mx.nd.array(np.random.RandomState(seed).normal(size=(8, WIDE)))
    with autograd.record():
        loss = (net(data) ** 2).mean()
    loss.backward()


def reduced(half: bool, times: int) -> Dict[str, Any]:
    mx.random.seed(0)
    net = nn.HybridSequential()
    for _ in range(6):
        net.add(nn.Dense(WIDE, in_units=WIDE, activation="tanh"))
    net.initialize(mx.init.Xavier())
    net.hybridize(static_alloc=True)
    trainer = make_trainer(net, Optimizer(lr=0.1, bucket_mb=0.5, fp16_allreduce=half))
    gradients, expected = 0.0, 0.0
    bytes_sent = []
    for step in range(times):
        want = step == 1  # then the sum is left in every rank's own gradients
        if want:
            sums = [np.zeros(p.shape) for p in net.collect_params().values()]
            for rank in range(dist.world_size()):
                backward(net, 100 * step + rank)
                sums = [a + p.grad().asnumpy() for a, p in zip(sums, net.collect_params().values())]
        backward(net, 100 * step + dist.rank())
        before = sent()
        reduce_and_update(trainer, None, want)
        mx.nd.waitall()
        dist.barrier()
        bytes_sent.append(sent() - before)
        if want:
            mean = mean_gradients(trainer)
            means = [total / dist.world_size() for total in sums]
            found = [mean[parameter.name] for parameter in net.collect_params().values()]
            gradients = max(float(abs(a - b).max()) for a, b in zip(found, means))
            expected = max(float(abs(mean).max()) for mean in means)
    weights = [parameter.data().asnumpy() for parameter in net.collect_params().values()]
    return {
        "off": gradients / expected,
        "weights": hashlib.sha256(b"".join(array.tobytes() for array in weights)).hexdigest(),
        "sum": float(sum(array.sum(dtype=np.float64) for array in weights)),
        "sent": sorted(bytes_sent)[times // 2],
        "gradient_bytes": sum(array.nbytes for array in weights),
        "on_node": getattr(allreduce_of(trainer), "_shared", None) is not None,
    }


def broadcast() -> Dict[str, Any]:
    """The bytes that this host has sent for a broadcast, the third, and whether it was right."""
    for number in range(3):
        array = mx.nd.random.uniform(shape=(300_000,)) + dist.rank()
        dist.barrier()
        before = sent()
        first = dist.broadcast_array(array, f"array.{number}")
        first.wait_to_read()
        dist.barrier()
    content = hashlib.sha256(first.asnumpy().tobytes()).hexdigest()
    return {"broadcast": content, "bytes": first.size * 4, "passed_on": sent() - before}


def main() -> None:
    dist.init()
    told = [reduced(half, int(sys.argv[1])) for half in (False, True)]
    told[0].update(broadcast())
    for half in told:
        print(json.dumps(half), flush=True)
    dist.shutdown()


if __name__ == "__main__":
    main()

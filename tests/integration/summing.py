"""A rank that makes small sums for ever, alone or within a layer of synced batch norm.

    python summing.py WAY

WAY is `python`, sums of dist, or `operator`, those of the layer's operator in C++. Rank 0 prints a
line for every hundredth. A rank that gives up says why on a line of its own, and ends with 3.
"""

import os
import sys

import mxnet as mx
import numpy as np

from trainer import batch_norm, dist
from trainer.batch_norm.rank_sum import registry


def main(way: str) -> None:
    dist.init()
    if not dist.sums_are_cheap():
        sys.exit("sums go through Horovod")
    layer = batch_norm.SyncBatchNorm(in_channels=64)
    layer.initialize()
    for number in range(1_000_000):
        if way == "python":
            total = dist.allreduce_sum(np.full(129, number * (1.0 + dist.rank())), "sum")
            right = number * dist.world_size() * (dist.world_size() + 1) / 2
            assert (total == right).all()
        else:
            with mx.autograd.train_mode():
                out = layer(mx.nd.full((1, 64), dist.rank()))
            assert np.isfinite(out.asnumpy()).all()
        if dist.is_root() and number % 100 == 0:
            print(f"sum {number}", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (RuntimeError, mx.MXNetError) as error:
        print(f"gave up: {registry.lost or error}", flush=True)
        os._exit(3)

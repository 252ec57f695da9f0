"""A rank's copy of the net: on its device, with the asked batch norm, alike on all ranks."""

from __future__ import annotations

from typing import List, Tuple

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import batch_norm, dist, sharding, summary
from .config import Config


def prepare(
    net: gluon.Block, config: Config, shape: Tuple[int, int, int], ctx: mx.Context
) -> List[summary.Row]:
    """Bring ``net`` to ``ctx`` with its weights drawn, its shapes known and its norms converted.

    Args:
        shape: (channels, height, width) of a sample.

    Returns:
        Its layers.
    """
    # Every rank draws the same weights.
    mx.random.seed(config.seed)
    np.random.seed(config.seed)
    _initialize(net, ctx)
    if config.batch_norm == "sync":
        batch_norm.convert_sync_batch_norm(net)
    elif config.batch_norm == "group":
        batch_norm.convert_sync_batch_norm(net, process_set=dist.node_process_set())
    # Deferred shapes are settled here, on all ranks: Horovod would broadcast them at the first
    # forward, and a forward on one rank alone would wait for ever.
    layers = summary.summarize(net, mx.nd.zeros((1, *shape), ctx=ctx))
    if config.model.hybridize and isinstance(net, gluon.HybridBlock):
        net.hybridize(static_alloc=True)
    return layers


def merge_running_statistics(net: gluon.Block, config: Config) -> None:
    """Make the ranks' running statistics one; collective.

    With synced norm they are one already; else each rank weighs by the samples it takes a step.
    """
    if config.batch_norm != "sync":
        whole = np.arange(config.train.global_batch_size)
        own = sharding.shard(whole, dist.rank(), dist.world_size())
        batch_norm.merge_running_statistics(net, len(own))


def _initialize(net: gluon.Block, ctx: mx.Context) -> None:
    """Draw the weights (Xavier, as the book does) that nobody has drawn yet; move the others."""
    for parameter in net.collect_params().values():
        try:
            parameter.reset_ctx(ctx)
        except ValueError:  # not initialised
            parameter.initialize(default_init=mx.init.Xavier(), ctx=ctx)

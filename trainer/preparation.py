"""What a rank makes at the start of a run before it needs the others: data, device, net."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from typing import List, NamedTuple, Optional, Tuple

import mxnet as mx
from mxnet import gluon

from . import dist, feed, mixed_precision, model, replica, summary, users_net
from .arrays import Arrays
from .config import Config
from .device import choose
from .loader import TrainLoader
from .step import Loss


class Prepared(NamedTuple):
    """A rank's own part of a run."""

    ctx: mx.Context
    train: Arrays
    test: Arrays
    loader: TrainLoader
    net: gluon.Block  # initialised, but not yet with the weights of rank 0
    layers: List[summary.Row]
    num_classes: int


def prepare(
    net: Optional[gluon.Block],
    config: Config,
    loss: Optional[Loss],
    data: Future[Tuple[Arrays, Arrays]],
    until_closed: contextlib.ExitStack,
) -> Prepared:
    """Prepare ``net``, or what ``config.model`` says, to be trained on ``data``; not collective.

    Args:
        loss: None for cross entropy.
        until_closed: closing it leaves the net as it was, apart from its weights and device.

    Raises:
        ConfigError, DataError: bad input.
    """
    ctx = choose(config.device, dist.local_rank())
    train, test = data.result()
    loader = feed.train_loader(train, config, ctx)
    net = net if net is not None else model.build(config.model)
    mixed_precision.check(net, config.train.precision, ctx)
    until_closed.enter_context(users_net.restored(net))
    until_closed.enter_context(mixed_precision.computing_in(net, config.train.precision))
    layers = replica.prepare(net, config, loader.shape, ctx)
    labels = 1 + int(max(train[1].max(), test[1].max()))
    num_classes = replica.class_scores(net, loader.shape, ctx, labels)
    if loss is not None:
        replica.check_loss(loss, num_classes, ctx)
    return Prepared(ctx, train, test, loader, net, layers, num_classes)

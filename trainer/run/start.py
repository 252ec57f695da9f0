"""What a rank makes at the start of a run before it needs the others: data, device, net."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from typing import List, NamedTuple, Optional, Tuple

import mxnet as mx
from mxnet import gluon

from .. import dist, model
from ..config import Config
from ..data import input_pipeline
from ..data.arrays import Arrays
from ..data.loader import TrainLoader
from ..dist.device import choose
from ..model import mixed_precision, summary, users_net
from ..model.prepare import class_scores, prepare_net
from ..step.loss import Loss, check_loss


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
    loader = input_pipeline.train_loader(train, config, ctx)
    net = net if net is not None else model.build(config.model)
    mixed_precision.check(net, config.train.precision, ctx)
    until_closed.enter_context(users_net.restored(net))
    until_closed.enter_context(mixed_precision.computing_in(net, config.train.precision))
    layers = prepare_net(net, config, loader.shape, ctx)
    labels = 1 + int(max(train[1].max(), test[1].max()))
    num_classes = class_scores(net, loader.shape, ctx, labels)
    if loss is not None:
        check_loss(loss, num_classes, ctx)
    return Prepared(ctx, train, test, loader, net, layers, num_classes)

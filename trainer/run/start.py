"""The start of a run, or of a benchmark of one: from a config to parts that are ready for a step.

Each rank prepares what it can alone: data, device, net. Then the ranks compare what must be alike,
and take the weights of rank 0 or of a checkpoint.
"""

from __future__ import annotations

import contextlib
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional

import mxnet as mx
from mxnet import gluon

from .. import batch_norm, dist, model
from .. import config as config_module
from ..checkpoint import RunState, pretrained, resume
from ..config import Config, to_dict
from ..console import print_line
from ..data import classes, input_pipeline
from ..data.input_pipeline import Sets
from ..data.loader import TrainLoader
from ..dist import environment
from ..dist.device import choose
from ..errors import ConfigError
from ..model import compiled_check, mixed_precision, prepare, replica, summary, users_net
from ..step import shared_gradients
from ..step.loss import Loss, check_loss, cross_entropy, warn_of_second_softmax
from ..step.optimizer import make_trainer
from . import agreement, outcome


def checked(net: Any, config: Any, loss: Optional[Loss], on_epoch_end: Any, given: bool) -> Config:
    """The config of a run on images that are ``given`` or not; refuses other arguments of fit."""
    if net is not None and not isinstance(net, gluon.Block):
        raise ConfigError(
            f"the net is a {type(net).__name__}; it must be a Gluon Block (a config alone goes as "
            "config=...)"
        )
    config = Config() if config is None else config_module.checked(config)
    if loss is not None and config.train.label_smoothing:
        raise ConfigError("train.label_smoothing is for the default loss; leave it out, or loss=")
    if on_epoch_end is not None:
        outcome.check(on_epoch_end)
    # A recorded config names no dataset that was not used.
    return replace(config, data=replace(config.data, dataset="arrays")) if given else config


class Own(NamedTuple):
    """What a rank makes without the others."""

    ctx: mx.Context
    sets: Sets
    loader: TrainLoader
    net: gluon.Block  # initialised, but not yet with the weights of all ranks
    layers: List[summary.Row]
    class_names: List[str]  # one for each score of the net
    digests: agreement.Digests  # of what the run is made of
    given: bool  # the net, instead of what config.model names

    @property
    def num_classes(self) -> int:
        """Scores of the net."""
        return len(self.class_names)


@dataclass(frozen=True)
class Started:
    """The parts of a run whose ranks have the same weights and stand before the same step."""

    config: Config
    loss: Optional[Loss]  # None for cross entropy
    own: Own
    trainer: gluon.Trainer
    state: RunState
    path: Optional[Path]  # the checkpoint it resumes from; on rank 0 alone

    @property
    def net(self) -> gluon.Block:
        return self.own.net

    @property
    def epoch_steps(self) -> int:
        """Steps per epoch."""
        return self.own.loader.steps_per_epoch

    @property
    def origin(self) -> RunState:
        """What each of the run's checkpoints says of where it comes from."""
        return RunState(
            config=to_dict(self.config),
            image_shape=self.own.sets.train.image_shape,
            train_size=len(self.own.sets.train),
            classes=self.own.sets.train.classes,
            class_names=self.own.class_names,
            launch=environment.launch_id(),
            made_of=self.own.digests,
            given=self.own.given,
        )

    @property
    def last_step(self) -> int:
        """Steps of the whole run, unless it stops early."""
        train = self.config.train
        steps = train.epochs * self.epoch_steps
        return steps if train.max_steps is None else min(steps, train.max_steps)


def join(config: Config, read: Callable[[], Sets]) -> Future[Sets]:
    """Join the other ranks, and meanwhile ``read`` the data; every rank's first call."""
    with ThreadPoolExecutor(1) as reader:
        data = reader.submit(read)
        dist.init(shared_gradients.wanted(config.optimizer), config.device == "cpu")
    return data


def start(
    net: Optional[gluon.Block],
    config: Config,
    loss: Optional[Loss],
    data: Future[Sets],
    choose_checkpoint: Callable[[Own], Optional[Path]],
    until_closed: contextlib.ExitStack,
) -> Started:
    """Bring all ranks to the same weights and step: initial ones, or those of a checkpoint.

    Args:
        net: None for what ``config.model`` says.
        loss: None for cross entropy.
        choose_checkpoint: called on rank 0; None for a new run.
        until_closed: closing it leaves the net as it was, apart from its weights and device.

    Raises:
        ConfigError, DataError, CheckpointError: bad input.
        PeerError: the same, on another rank.
    """
    dist.node_process_set()  # collective, so not inside together()
    dist.leaders_process_set()
    with dist.together():  # the first, which ends when the ranks have connected, see dist.init
        own = _prepare(net, config, loss, data, until_closed)
    with dist.together():
        agreement.check(config)
        agreement.check_devices(own.ctx)
        agreement.check_sets(own.digests, own.sets.sizes)
        agreement.check_net(own.net)
    path: Optional[Path] = None
    with dist.together():
        trainer = make_trainer(own.net, config.optimizer)
        # Only rank 0 looks for checkpoints: all ranks use the same one, without a shared disk.
        if dist.is_root():
            path = choose_checkpoint(own)
            if path is None and config.model.weights is not None:
                print_line(
                    "; ".join(pretrained.load(Path(config.model.weights), own.net)), sys.stderr
                )
    batch_norm.connect(own.net)
    state, statistics = resume.restore(path, own.net, trainer)
    replica.take_statistics(own.net, statistics)
    return Started(config, loss, own, trainer, state, path)


def _prepare(
    net: Optional[gluon.Block],
    config: Config,
    loss: Optional[Loss],
    data: Future[Sets],
    until_closed: contextlib.ExitStack,
) -> Own:
    ctx = choose(config.device, dist.local_rank())
    sets = data.result()
    until_closed.callback(sets.close)
    if config.train.patience is not None and sets.watched is None:
        raise ConfigError(
            f"train.patience is {config.train.patience}, and there is nothing to evaluate; set "
            "data.validation=0.1, give a test set, or set train.patience=null"
        )
    input_pipeline.check_shapes(sets, config.data)
    loader = input_pipeline.train_loader(sets.train, config, ctx)
    given_net = net is not None
    net = net if net is not None else model.build(config.model)
    mixed_precision.check(net, config.train.precision, ctx)
    own = {**agreement.of_loss(loss), **agreement.of_initial_weights(net)}
    until_closed.enter_context(users_net.restored(net))
    until_closed.enter_context(mixed_precision.computing_in(net, config.train.precision))
    layers = prepare.prepare_net(net, config, loader.shape, ctx)
    scores = prepare.class_scores(net, loader.shape, ctx, sets.num_classes)
    sets.expect(scores.shape[1])
    compiled_check.check(net, lambda: next(iter(loader.from_step(0, 1))).data)
    if loss is not None:
        check_loss(loss, scores.shape[1], ctx)
    if environment.rank() == 0:
        warn_of_second_softmax(loss or cross_entropy, scores)
    names = classes.names(config.data, sets.train.classes, scores.shape[1])
    digests = {**agreement.of_data(sets), **own, **agreement.of_net(net)}
    return Own(ctx, sets, loader, net, layers, names, digests, given_net)

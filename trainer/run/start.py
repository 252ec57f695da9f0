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
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import mxnet as mx
from mxnet import gluon

from .. import batch_norm, dist, model
from ..checkpoint import RunState, params_file, resume, run_folder
from ..config import Config, to_dict
from ..console import print_line
from ..data import classes, input_pipeline, randomness
from ..data.input_pipeline import Sets
from ..data.loader import TrainLoader
from ..dist import environment
from ..dist.device import choose, tell_of_threads
from ..errors import ConfigError
from ..model import ema, graph, mixed_precision, prepare, replica, summary, users_net
from ..model.loss_scale import LossScale
from ..report import loggers
from ..step import shared_gradients
from ..step.evaluation import Metrics, built_in, check_metrics
from ..step.loss import Loss, check_loss, cross_entropy, warn_of_second_softmax
from ..step.optimizer import make_trainer
from . import agreement, outcome


def checked(
    net: Any, config: Any, loss: Optional[Loss], hooks: outcome.Hooks, given: bool
) -> Config:
    """The config of a run on images that are ``given`` or not; refuses other arguments of fit."""
    if net is not None and not isinstance(net, gluon.Block):
        raise ConfigError(
            f"the net is a {type(net).__name__}; it must be a Gluon Block (a config alone goes as "
            "config=...)"
        )
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise ConfigError(
            f"config is a {type(config).__name__}; it must be a trainer.Config, as "
            "trainer.config.from_dict makes of a mapping and trainer.config.load of a YAML file"
        )
    if loss is not None and config.train.label_smoothing:
        raise ConfigError("train.label_smoothing is for the default loss; leave it out, or loss=")
    hooks.check()
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
        return len(self.class_names)

    def answers(self) -> List[float]:
        """What tells the net, as one model, from others with its parameters; [] if nothing does."""
        with mixed_precision.computing_in(self.net, "float32"):
            return prepare.answers(self.net, self.loader.shape, self.ctx)


@dataclass(frozen=True)
class Started:
    """The parts of a run whose ranks have the same weights and stand before the same step."""

    config: Config
    loss: Optional[Loss]  # None for cross entropy
    metrics: Metrics
    own: Own
    trainer: gluon.Trainer
    ema: ema.Ema
    scale: Optional[LossScale]  # in float16
    state: RunState
    path: Optional[Path]  # the checkpoint it resumes from; on rank 0 alone

    @property
    def net(self) -> gluon.Block:
        return self.own.net

    @property
    def draws(self) -> bool:
        """Whether a step may draw from MXNet's generators."""
        known = self.loss is None and self.config.optimizer.name in ("sgd", "nag", "adam")
        return not known or not graph.draws_nothing(self.net)

    @property
    def epoch_steps(self) -> int:
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


def join(config: Config, read: Callable[[], Sets], aloud: bool = False) -> Future[Sets]:
    """Join the other ranks, and meanwhile ``read`` the data; every rank's first call.

    It takes seconds: if ``aloud``, rank 0 tells what is waited for.
    """
    if aloud and environment.rank() == 0 and config.monitor.log_format == "text":
        ranks = environment.size()
        waits = f"waiting for {ranks} ranks, " if ranks > 1 else ""
        print_line(f"starting: {waits}reading {config.data.dataset}, building the net")
    with ThreadPoolExecutor(1) as reader:
        data = reader.submit(read)
        dist.init(shared_gradients.wanted(config.optimizer), config.device == "cpu")
    return data


def start(
    net: Optional[gluon.Block],
    config: Config,
    loss: Optional[Loss],
    data: Future[Sets],
    choose_run: Callable[[agreement.Digests, int], Tuple[Config, Optional[Path]]],
    until_closed: contextlib.ExitStack,
    metrics: Optional[Metrics] = None,
    force: bool = False,
) -> Started:
    """Bring all ranks to the same weights and step: initial ones, or those of a checkpoint.

    ``net`` is None for what ``config.model`` says, ``loss`` for cross entropy. ``choose_run`` is
    called on rank 0 with digests and the number of training images, for the config with the run's
    name, and the checkpoint that it resumes from; None for a new run. Closing ``until_closed``
    leaves the net as it was, apart from its weights and device. ``force`` resumes with a net that
    has the checkpoint's parameters, but another forward.

    Bad input raises ConfigError, DataError or CheckpointError; on other ranks PeerError.
    """
    # Making process sets is collective, so not inside together(); and only those that are needed,
    # because each costs Horovod a round of messages in every cycle.
    several_nodes = dist.local_size() < dist.world_size()
    if several_nodes and dist.any_rank(config.batch_norm == "group", "group"):
        dist.node_process_set()
    with dist.together():  # the first, which ends when the ranks have connected, see dist.init
        own = _prepare(net, config, loss, data, until_closed)
        check_metrics(metrics := metrics or {}, own.num_classes, own.ctx)
        metrics = {**built_in(config.evaluate, own.num_classes), **metrics}
    with dist.together():
        agreement.check(config)
        agreement.check_devices(own.ctx)
        agreement.check_sets({**own.digests, "metrics": repr(list(metrics))}, own.sets.sizes)
        agreement.check_net(own.net)
    if own.ctx.device_type == "cpu" and config.optimizer.shared_memory:
        dist.leaders_process_set()
    path: Optional[Path] = None
    with dist.together(), run_folder.usable(config.folder):
        trainer = make_trainer(own.net, config.optimizer)
        # Only rank 0 looks for checkpoints: all ranks use the same one, without a shared disk.
        if dist.is_root():
            config, path = choose_run(own.digests, len(own.sets.train))
            if path is None and config.model.weights is not None:
                told = params_file.start_from(Path(config.model.weights), own.net)
                print_line("; ".join(told), sys.stderr)
    batch_norm.connect(own.net)
    found = resume.restore(path, own.net, trainer, None if force else own.answers)
    if dist.world_size() > 1:
        with dist.together():
            agreement.check_answers(own.answers())
    replica.take_statistics(own.net, found.averaged)
    averages = ema.Ema(own.net, config.train.ema)
    averages.train_on(found.others)
    replica.take_statistics(own.net, found.statistics)
    half = config.train.precision == "float16"
    scale = LossScale(own.ctx, found.state.loss_scale) if half else None
    return Started(config, loss, metrics, own, trainer, averages, scale, found.state, path)


def _prepare(
    net: Optional[gluon.Block],
    config: Config,
    loss: Optional[Loss],
    data: Future[Sets],
    until_closed: contextlib.ExitStack,
) -> Own:
    ctx = choose(config.device, dist.local_rank())
    if ctx.device_type == "cpu":
        tell_of_threads()
    sets = data.result()
    until_closed.callback(sets.close)
    for name, patience in config.patient.items():
        if patience is not None and sets.watched is None:
            raise ConfigError(
                f"{name} is {patience}, and there is nothing to evaluate; set "
                f"data.validation=0.1, give a test set, or set {name}=null"
            )
    input_pipeline.check_shapes(sets, config.data)
    loader = input_pipeline.train_loader(sets.train, config, ctx)
    given_net = net is not None
    net = net if net is not None else model.build(config.model, seed=config.seed)
    mixed_precision.check(net, config.train.precision, ctx)
    weights = agreement.of_initial_weights(net, config.model.weights)
    own = {**agreement.of_loss(loss, net), **weights}
    until_closed.enter_context(users_net.restored(net))
    until_closed.enter_context(randomness.seeded_dropout())
    until_closed.enter_context(mixed_precision.computing_in(net, config.train.precision))
    layers = prepare.prepare_net(net, config, loader.shape, ctx)
    scores = prepare.class_scores(net, loader.shape, ctx, sets.num_classes)
    sets.expect(scores.shape[1])
    image = prepare.fixed_image(loader.shape, ctx)
    users_net.check_compiled(net, image)
    prepare.check_state(net, image)
    if loss is not None:
        check_loss(loss, scores.shape[1], ctx)
    if environment.rank() == 0:
        warn_of_second_softmax(loss or cross_entropy, scores)
        input_pipeline.tell_of_ranges(sets, config.data)
    names = classes.names(config.data, sets.train.classes, scores.shape[1])
    digests = {**agreement.of_data(sets), **own, **agreement.of_net(net)}
    return Own(ctx, sets, loader, net, layers, names, digests, given_net)


def take_folder(
    started: Started, unnamed: Optional[Config], until_closed: contextlib.ExitStack
) -> Started:
    """Lock the run's folder, whose name rank 0 has decided, until closed; collective.

    ``unnamed`` is the config before the run had a number; None where it has none.
    """
    config = started.config
    with dist.together(), run_folder.usable(config.folder):
        if dist.is_root():
            loggers.check(config.monitor.loggers)
            config = run_folder.take(config, started.path, unnamed, until_closed)
    return replace(started, config=replace(config, name=dist.broadcast_object(config.name)))

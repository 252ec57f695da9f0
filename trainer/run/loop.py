"""fit(): the course of a run, and the only module that sees all its parts.

config -> ranks -> device -> data -> net -> checkpoint -> steps -> evaluation -> checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import Optional, Union

import mxnet as mx
from mxnet import gluon

from .. import checkpoint, dist
from ..checkpoint import resume as resuming
from ..checkpoint import run_folder
from ..checkpoint.saver import Saver
from ..config import Config
from ..data import input_pipeline, randomness
from ..data.arrays import Arrays, Samples
from ..dist import environment
from ..dist.preemption import StopRequest
from ..dist.watchdog import Watchdog
from ..model import replica
from ..report.report import Report
from ..step import shared_gradients
from ..step.evaluation import Evaluation
from ..step.loss import Loss
from ..step.metrics import NonFiniteError, TrainMetrics
from ..step.schedule import set_lr
from ..step.step import train_step
from ..step.timing import WARMUP_STEPS, Throughput, Timing
from . import agreement, outcome, start
from .early_stopping import Plateau
from .evaluator import Evaluator
from .outcome import EpochEnd, OnEpochEnd, Result


def fit(
    net: Optional[gluon.Block] = None,
    config: Optional[Config] = None,
    *,
    loss: Optional[Loss] = None,
    resume: str = "auto",
    force: bool = False,
    on_epoch_end: Optional[OnEpochEnd] = None,
    train: Union[Arrays, Samples, None] = None,
    test: Union[Arrays, Samples, None] = None,
) -> Result:
    """Train ``net`` on every rank that the launcher started, or in this process alone.

    Args:
        net: any Gluon block that takes float32 (B, C, H, W) and gives logits (B, K); initialised
            or not. None builds what ``config.model`` says. It is trained in place; apart from its
            weights and device it is afterwards as it was, also if the run fails.
        config: every setting; None takes the defaults.
        loss: maps logits (B, K) and labels, float32 (B,), to the loss of each sample, (B,): one of
            Gluon's losses or any function of arrays. None takes softmax cross entropy.
        resume: ``auto`` resumes from the newest complete checkpoint in the run's folder, ``none``
            starts anew, anything else is the path of a checkpoint. Whatever else the folder holds
            that is not an ancestor of the new run is set aside. A launch that is restarted after a
            fault resumes from its own checkpoints in any case. Only rank 0 needs access to the
            folder.
        force: resume even if settings, images, labels, the net or the loss differ.
        on_epoch_end: called on every rank with an :class:`EpochEnd` after each epoch, and where
            ``train.max_steps`` ends the run within one, once its checkpoint is on its way. An
            exception ends the run, which resumes after that epoch. It must not change the net.
        train, test: images, uint8 (N, H, W[, C]), and labels, integers or texts (N,), as arrays; or
            a dataset of such pairs. All of it on every rank; both None: those of ``config.data``.

    Raises:
        ConfigError, DataError, CheckpointError: bad input; nothing has been written yet.
        PeerError: the same, on another rank.
        TrainingError: loss or weights are not finite, or the last checkpoint cannot be written.
        KeyboardInterrupt: after ctrl-C; a process that trains alone saves first.
    """
    config = start.checked(net, config, loss, on_epoch_end, given=train is not None)
    with contextlib.ExitStack() as until_closed:  # a notebook goes on, however the run ends
        seconds = config.train.watchdog_seconds
        watchdog = until_closed.enter_context(Watchdog(seconds, environment.where()))
        stop = until_closed.enter_context(StopRequest())
        until_closed.enter_context(randomness.kept())
        watchdog.beat("the rendezvous of all ranks")
        sets = config.data, train, test, config.seed
        data = start.join(config, lambda: input_pipeline.read(*sets))
        watchdog.beat("the start of the run")

        def choose(own: start.Own) -> Optional[Path]:
            return resuming.choose(config, resume, force, own.digests, len(own.sets.train))

        started = start.start(net, config, loss, data, choose, until_closed)
        result = _Run(started, on_epoch_end, watchdog, until_closed).go(stop)
    if result.stopped and stop.interrupted:
        raise KeyboardInterrupt
    return result


class _Run:
    """The steps of a run from where it starts, and what happens between them."""

    def __init__(
        self,
        started: start.Started,
        on_epoch_end: Optional[OnEpochEnd],
        watchdog: Watchdog,
        until_closed: contextlib.ExitStack,
    ):
        self.config, self.loss, self.on_epoch_end = started.config, started.loss, on_epoch_end
        self.own, self.net, self.trainer = started.own, started.net, started.trainer
        self.watchdog, self.origin = watchdog, started.origin
        self.epoch_steps, self.last_step = started.epoch_steps, started.last_step
        state, monitor = started.state, started.config.monitor
        self.step = state.step
        self.saved_step = self.step if started.path else None
        self.metrics = TrainMetrics(self.own.ctx, state.totals, self.net.collect_params().values())
        self.plateau = Plateau(*(state.plateau or ()))
        self.stopped_early = False  # last_step is then the one at which train.patience was out
        self._stop_early_if_due()
        self.evaluation: Optional[Evaluation] = None
        self.test: Optional[Evaluation] = None  # besides a validation set
        self.throughput = Throughput()
        self.report = self._take_folder(started, until_closed)
        self.evaluator = Evaluator(started, self.report, watchdog)
        beat = functools.partial(watchdog.beat, "a save under way")
        told, keep = (self.report.warning, self.report.checkpoint), self.config.checkpoint.keep
        self.saver = Saver(self.config.checkpoint_folder, keep, *told, beat)
        self.timing = Timing(
            monitor.every_steps if monitor.tensorboard else None, self.step + WARMUP_STEPS
        )

    def _take_folder(self, started: start.Started, until_closed: contextlib.ExitStack) -> Report:
        """Lock the run's folder and report the beginning; collective."""
        config, own = self.config, self.own
        complete = self.step >= self.last_step
        with dist.together(), run_folder.usable(config.folder):
            if dist.is_root():
                until_closed.enter_context(run_folder.taken_folder(config, started.path))
            steps = self.epoch_steps, self.step, started.last_step
            report = Report(config, *steps, own.class_names, complete)
            until_closed.callback(report.close)
        report.begin(own.sets.sizes, own.ctx, started.path, own.layers, self.net)
        return report

    def go(self, stop: StopRequest) -> Result:
        """Make the remaining steps, evaluate and save."""
        stopped = False
        try:
            stopped = self._train(stop)
            if not stopped:
                self.evaluation = self.evaluation or self.evaluator.evaluate(self.step, last=False)
                self.test = self.evaluator.test(self.step)
            self._await_save()
        except NonFiniteError as error:
            self._await_save()
            dist.shutdown()
            shared_gradients.release(self.trainer)
            raise outcome.not_finite(self.config, error) from error
        finally:
            self.saver.wait()
            self.report.end_display()
        return self._finish(stopped)

    def _train(self, stop: StopRequest) -> bool:
        """Make the remaining steps; returns whether it was asked to stop before the last."""
        config = self.config
        batches = self.own.loader.from_step(self.step, self.last_step)
        for made, batch in enumerate(batches, start=1):
            self.watchdog.beat(f"step {self.step}")
            randomness.seed_step(config.seed, self.step, dist.rank())
            lr = set_lr(self.trainer, config, self.step, self.epoch_steps)
            due = self._due(config.monitor.every_steps, offset=1)
            mark = self.timing.of(self.step)
            norm = due or self._due(self.epoch_steps, offset=1)  # then histograms of gradients
            result = train_step(self.net, self.trainer, batch, config, norm, mark, self.loss)
            self.metrics.add(self.step, result, batch.samples)
            self.step += 1
            self.throughput.step(batch.global_samples)
            if due:
                self._report(lr, result.gradient_norm)
            self.report.step(self.step)
            self.saver.poll()
            if self._due(self.epoch_steps):
                self._end_epoch()
            elif self._due(config.checkpoint.every_steps):
                self._save()
            if self.step == self.last_step:  # maybe before that of the batches: stopped early
                break
            if stop.agreed():
                if self.saved_step != self.step:
                    self._save()
                return True
            if made == WARMUP_STEPS or (made > WARMUP_STEPS and self.saved_step == self.step):
                mx.nd.waitall()
                self.throughput.begin()
        return False

    def _due(self, every: Optional[int], offset: int = 0) -> bool:
        """Whether what is due every ``every`` steps is due now; after the last step it is."""
        step = self.step + offset
        return every is not None and (step % every == 0 or step == self.last_step)

    def _report(self, lr: float, norm: Optional[mx.nd.NDArray]) -> None:
        # A run cut short by train.max_steps keeps its window, for the run that resumes from there.
        means = self.metrics.read(end=self.step % self.config.monitor.every_steps == 0)
        self.throughput.mark()
        times = self.timing.read()
        self.report.training(self.step, means, lr, norm, self.throughput.read(), times)

    def _end_epoch(self) -> None:
        whole = self.step % self.epoch_steps == 0
        epoch = -(-self.step // self.epoch_steps)
        training = self.metrics.read_epoch(end=whole)
        self.report.epoch(self.step, training)
        self.throughput.end()
        self.report.parameters(self.step, self.net, self.trainer)
        every = self.config.evaluate.every_epochs
        scheduled = whole and every > 0 and epoch % every == 0
        last = self.step == self.last_step
        self.evaluation = self.evaluator.evaluate(self.step, last) if last or scheduled else None
        # What train.max_steps adds does not count: a run without it would stop elsewhere.
        if scheduled and self.evaluation is not None:
            self.plateau = self.plateau.after(self.evaluation.accuracy)
            if self._stop_early_if_due() and self.config.calibrate_samples:
                self.evaluation = self.evaluator.evaluate(self.step, last=True)
        self._save(None if self.evaluation is None else self.evaluation.accuracy)
        if self.on_epoch_end is not None:
            self.watchdog.beat(f"on_epoch_end after step {self.step}")
            self.on_epoch_end(EpochEnd(epoch, self.step, training, self.evaluation))

    def _stop_early_if_due(self) -> bool:
        """End the run at this step if train.patience is out; returns whether it does."""
        due = self.step < self.last_step and self.plateau.outlasts(self.config.train.patience)
        if due:
            self.last_step, self.stopped_early = self.step, True
        return due

    def _save(self, accuracy: Optional[float] = None) -> None:
        self.watchdog.beat(f"the save after step {self.step}")
        # This raises on every rank if the weights are not finite, so that they are never saved.
        totals = self.metrics.totals()
        sums = agreement.checksums(self.net)
        where = agreement.parted(sums)
        if where is not None:
            raise outcome.parted(self.config, self.step, where)
        self.throughput.end()
        state = replace(
            self.origin,
            step=self.step,
            totals=totals,
            accuracy=accuracy,
            plateau=self.plateau,
            weights=agreement.of_weights(sums),
        )
        self.saved_step = self.step
        statistics = replica.gather_statistics(self.net, self.config)
        if statistics is not None and self._due(self.epoch_steps):
            self.report.drift(self.step, replica.drift(self.net, statistics))
        self.report.flush(self.step)
        self._await_save()  # before copying: memory holds one copy at most
        with replica.as_one_model(self.net, self.config):
            if dist.is_root():
                state = replace(state, answers=self.evaluator.answers())
                self.saver.begin(checkpoint.snapshot(self.net, self.trainer, state, statistics))

    def _await_save(self) -> None:
        """Wait for the save under way, if any, and have other watchdogs hear of it; collective."""
        while dist.any_rank(not self.saver.ends_soon(), "save"):
            self.watchdog.beat("a save of rank 0's under way")
        self.saver.wait()

    def _finish(self, stopped: bool) -> Result:
        self.watchdog.beat("the end of the run")
        shared_gradients.release(self.trainer)
        reason = dist.broadcast_object(self.saver.wait())
        if reason is not None:
            dist.shutdown()
            raise outcome.not_saved(self.config, self.step, self.last_step, reason)
        replica.merge_running_statistics(self.net, self.config)
        mx.nd.waitall()
        evaluation = None if stopped else self.evaluation
        speed = self.throughput.overall
        state = "stopped" if stopped else "stopped early" if self.stopped_early else "done"
        self.report.end(self.step, state, evaluation, speed, self.test)
        how = stopped, self.stopped_early, self.test
        return Result(self.config.folder, self.step, evaluation, speed, *how)

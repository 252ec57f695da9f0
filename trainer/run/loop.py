"""fit(): the course of a run, and the only module that sees all its parts.

config -> ranks -> device -> data -> net -> checkpoint -> steps -> evaluation -> checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any, Callable, List, Optional, Union

import mxnet as mx
from mxnet import gluon

from .. import batch_norm, dist
from ..checkpoint import resume as resuming
from ..checkpoint import run_folder
from ..config import Config
from ..data import input_pipeline, randomness
from ..data.arrays import Arrays, Samples
from ..dist import environment
from ..dist.preemption import StopRequest
from ..dist.watchdog import Watchdog
from ..model import replica
from ..report.report import Report
from ..step import shared_gradients
from ..step.evaluation import Evaluation, Metrics
from ..step.loss import Loss
from ..step.metrics import NonFiniteError, TrainMetrics, step_means
from ..step.schedule import set_lr
from ..step.step import train_step
from ..step.timing import WARMUP_STEPS, Throughput, Timing
from . import outcome, start
from .evaluator import Evaluator
from .outcome import EpochEnd, EvaluationEnd, Hooks, Plateau, Result, StepEnd
from .saves import Saves


def fit(
    net: Optional[gluon.Block] = None,
    config: Optional[Config] = None,
    *,
    loss: Optional[Loss] = None,
    resume: str = "auto",
    force: bool = False,
    numbered: bool = False,
    metrics: Optional[Metrics] = None,
    on_step: Optional[Callable[[StepEnd], Any]] = None,
    on_evaluation: Optional[Callable[[EvaluationEnd], Any]] = None,
    on_epoch_end: Optional[Callable[[EpochEnd], Any]] = None,
    train: Union[Arrays, Samples, None] = None,
    validation: Union[Arrays, Samples, None] = None,
    test: Union[Arrays, Samples, None] = None,
) -> Result:
    """Train ``net`` on every rank that the launcher started, or in this process alone.

    Args:
        net: any Gluon block that takes float32 (B, C, H, W) and gives logits (B, K); initialised
            or not. None builds what ``config.model`` says. It is trained in place; apart from its
            weights and device it is afterwards as it was, also if the run fails.
        config: every setting; None takes the defaults.
        loss: of logits (B, K) and labels, float32 (B,), to (B,), as Gluon's; None: cross entropy.
        resume: ``auto`` resumes from the newest complete checkpoint in the run's folder, which only
            rank 0 needs, ``none`` starts anew, anything else is a checkpoint's path. What is no
            ancestor of the run is set aside. A launch restarted after a fault resumes from its own.
        force: resume even if settings, images, labels, the net or the loss differ.
        numbered: begin, or resume, NAME-2, -3, ... where the run's folder is of other settings.
        metrics: by name, functions as ``loss`` is; evaluations tell their means over all samples.
        on_step, on_evaluation, on_epoch_end: called on every rank with a :class:`StepEnd`, an
            :class:`EvaluationEnd`, an :class:`EpochEnd` (also where ``train.max_steps`` ends the
            run). An exception ends the run; they must not change the net.
        train, validation, test: arrays (images, uint8 (N, H, W[, C]); labels, integers or texts
            (N,)) or a dataset of pairs, all on every rank; None: those of ``config.data``.

    Raises:
        ConfigError, DataError, CheckpointError; on other ranks PeerError: bad input, at the start.
        TrainingError: loss or weights are not finite, or the last checkpoint cannot be written.
        KeyboardInterrupt: after ctrl-C; a process that trains alone saves first.
        SystemExit: code 85, once a run that was asked to stop is saved, under ``python -m launch``.
    """
    hooks = Hooks(on_step, on_evaluation, on_epoch_end)
    config = start.checked(net, config, loss, hooks, given=train is not None)
    with contextlib.ExitStack() as until_closed:  # a notebook goes on, however the run ends
        seconds = config.train.watchdog_seconds
        watchdog = until_closed.enter_context(Watchdog(seconds, environment.where()))
        stop = until_closed.enter_context(StopRequest(config.train.max_minutes))
        until_closed.enter_context(randomness.kept())
        watchdog.beat("the rendezvous of all ranks")
        sets = config.data, train, test, config.seed, validation
        data = start.join(config, lambda: input_pipeline.read(*sets), aloud=True)
        watchdog.beat("the start of the run")
        by_number = numbered and not force and resume in ("auto", "none")
        choose = functools.partial(resuming.choose_run, config, resume, force, by_number)
        started = start.start(net, config, loss, data, choose, until_closed, metrics, force)
        started = start.take_folder(started, config if by_number else None, until_closed)
        result = _Run(started, hooks, watchdog, stop, until_closed).go()
    return outcome.unless_stopped(result, stop)


class _Run:
    """The steps of a run from where it starts, and what happens between them."""

    def __init__(
        self,
        started: start.Started,
        hooks: Hooks,
        watchdog: Watchdog,
        stop: StopRequest,
        until_closed: contextlib.ExitStack,
    ):
        self.run, self.config, self.net = started, started.config, started.net
        self.hooks, self.watchdog, self.stop = hooks, watchdog, stop
        self.draws = started.draws or any(hook is not None for hook in hooks)
        state, monitor = started.state, started.config.monitor
        self.step = state.step
        self.last_step = started.last_step  # or the one at which train.patience was out
        # A stop has left the evaluation to do that ends the epoch, or the run within one.
        cut = self.step == self.last_step and started.own.sets.watched and state.accuracy is None
        self.due = state.totals[1][2] > 0 and bool(cut or self.step % started.epoch_steps == 0)
        parameters = self.net.collect_params().values()
        self.metrics = TrainMetrics(started.own.ctx, state.totals, parameters, started.scale)
        self.plateau = Plateau(*(state.plateau or ()))
        self._stop_early_if_due()
        self.evaluation: Optional[Evaluation] = None
        self.test: Optional[Evaluation] = None  # besides a validation set
        self.throughput = Throughput()
        self.report = self._report_begin(until_closed)
        self.evaluator = Evaluator(started, self.report, watchdog, hooks, stop)
        self.saves = Saves(started, self.report, watchdog)
        timed = monitor.every_steps if monitor.loggers else None
        self.timing = Timing(timed, self.step + WARMUP_STEPS)

    def _report_begin(self, until_closed: contextlib.ExitStack) -> Report:
        """Open the report and tell the beginning; collective."""
        run, own = self.run, self.run.own
        with dist.together(), run_folder.usable(self.config.folder):
            steps = run.epoch_steps, self.step, run.last_step
            complete = self.step >= self.last_step and not self.due
            report = Report(self.config, *steps, own.class_names, complete)
            until_closed.push(report.close)
        report.begin(own.sets.sizes, own.ctx, run.path, own.layers, own.net)
        return report

    def go(self) -> Result:
        """Make the remaining steps, evaluate and save."""
        stopped = True
        try:
            with contextlib.suppress(outcome.Stopped):
                self._train()
                self.evaluation = self.evaluation or self.evaluator.evaluate(self.step, last=False)
                self.test = self.evaluator.test(self.step)
                stopped = False
            self.saves.wait()
        except NonFiniteError as error:
            self.saves.wait()
            dist.settle()
            shared_gradients.release(self.run.trainer)
            raise outcome.not_finite(self.config, error) from error
        finally:
            self.saves.saver.wait()
            self.report.end_display()
        return self._finish(stopped)

    def _train(self) -> None:
        """Make the remaining steps; raises Stopped where asked to before the last."""
        run, config, net = self.run, self.config, self.net
        if self.due:
            self._end_epoch()
        batches = run.own.loader.from_step(self.step, self.last_step)
        for made, batch in enumerate(batches, start=1):
            self.watchdog.beat(f"step {self.step}")
            randomness.seed_step(config.seed, self.step, dist.rank(), self.draws)
            reduced = self.plateau.reductions
            lr = set_lr(run.trainer, config, self.step, run.epoch_steps, reduced)
            due = self._due(config.monitor.every_steps, offset=1)
            mark = self.timing.of(self.step)
            norm = due or self._due(run.epoch_steps, offset=1)  # then histograms of gradients
            result = train_step(net, run.trainer, batch, config, norm, mark, run.loss, run.scale)
            self.metrics.add(self.step, result, batch.samples)
            self.step += 1
            run.ema.after(self.step)
            self.throughput.step(batch.global_samples)
            if due:
                self._report(lr, result.gradient_norm)
            elif made == 1 and config.monitor.log_format == "text":
                self.report.first_step(self.step, step_means(result, batch.samples))
            if self.hooks.on_step is not None:
                epoch = -(-self.step // run.epoch_steps)
                self.hooks.on_step(StepEnd(epoch, self.step, lr, batch.samples, result))
            self.report.step(self.step)
            self.saves.saver.poll()
            if self._due(run.epoch_steps):
                self._end_epoch()
            elif self._due(config.checkpoint.every_steps):
                self._save()
            if self.step == self.last_step:  # maybe before that of the batches: stopped early
                break
            if self.stop.agreed():
                if self.saves.step != self.step:
                    self._save()
                raise outcome.Stopped
            if made == WARMUP_STEPS or (made > WARMUP_STEPS and self.saves.step == self.step):
                mx.nd.waitall()
                self.throughput.begin()

    def _due(self, every: Optional[int], offset: int = 0) -> bool:
        """Whether what is due every ``every`` steps is due now; after the last step it is."""
        step = self.step + offset
        return every is not None and (step % every == 0 or step == self.last_step)

    def _report(self, lr: float, norm: Optional[mx.nd.NDArray]) -> None:
        # A run cut short by train.max_steps keeps its window, for the run that resumes from there.
        means = self.metrics.read(end=self.step % self.config.monitor.every_steps == 0)
        self.throughput.mark()
        times = self.timing.read()
        if self.metrics.loss_scale is not None:
            times.update(self.metrics.loss_scale.figures())
        self.report.training(self.step, means, lr, norm, self.throughput.read(), times)

    def _end_epoch(self) -> None:
        whole = self.step % self.run.epoch_steps == 0
        epoch = -(-self.step // self.run.epoch_steps)
        training = self.metrics.read_epoch(end=False)
        if not self.due:
            found: List[List[int]] = []
            if self.config.data.bad_samples == "skip":
                found = dist.gather_objects([*self.run.own.sets.train.skipped])
            self.report.epoch(self.step, training, len({*itertools.chain(*found)}))
            self.throughput.end()
            self.report.parameters(self.step, self.net, self.run.trainer)
        try:
            self._evaluate(whole, epoch)
        except outcome.Stopped:
            self._save()  # with the epoch's sums, by which a resume knows what is due
            raise
        self.due = False
        if whole:
            self.metrics.read_epoch()
        self._save(None if self.evaluation is None else self.evaluation.accuracy)
        if self.hooks.on_epoch_end is not None:
            self.watchdog.beat(f"on_epoch_end after step {self.step}")
            self.hooks.on_epoch_end(EpochEnd(epoch, self.step, training, self.evaluation))

    def _evaluate(self, whole: bool, epoch: int) -> None:
        """Evaluate where it is due after ``epoch``, which is ``whole`` unless the run is cut."""
        every = self.config.evaluate.every_epochs
        scheduled = whole and every > 0 and epoch % every == 0
        last = self.step == self.last_step
        self.evaluation = self.evaluator.evaluate(self.step, last) if last or scheduled else None
        # What train.max_steps adds does not count: a run without it would stop elsewhere.
        # Nor does what comes after patience was out, where a stop has left that to do.
        counts = scheduled and not self.plateau.outlasts(self.config.train.patience)
        if counts and self.evaluation is not None:
            patience = self.config.schedule.patience
            self.plateau = self.plateau.after(self.evaluation.accuracy, patience)
            if self._stop_early_if_due() and self.config.calibrate_samples:
                self.evaluation = self.evaluator.evaluate(self.step, last=True)

    def _stop_early_if_due(self) -> bool:
        """End the run at this step if train.patience is out; returns whether it does."""
        due = self.step < self.last_step and self.plateau.outlasts(self.config.train.patience)
        if due:
            self.last_step = self.step
        return due

    def _save(self, accuracy: Optional[float] = None) -> None:
        self.watchdog.beat(f"the save after step {self.step}")
        # This raises on every rank if the weights are not finite, so that they are never saved.
        totals = self.metrics.totals()
        self.throughput.end()
        scale = self.metrics.loss_scale
        self.saves.begin(
            self.step, totals=totals, accuracy=accuracy, plateau=self.plateau, loss_scale=scale
        )

    def _finish(self, stopped: bool) -> Result:
        self.watchdog.beat("the end of the run")
        shared_gradients.release(self.run.trainer)
        reason = dist.broadcast_object(self.saves.saver.wait())
        if reason is not None:
            dist.settle()
            raise outcome.not_saved(self.config, self.step, self.last_step, reason)
        self.run.ema.swap()  # the net in the end is the one that was evaluated and saved
        replica.merge_running_statistics(self.net, self.config)
        mx.nd.waitall()
        batch_norm.disconnect(self.net)
        evaluation = None if stopped else self.evaluation
        speed = self.throughput.overall
        early = not stopped and self.last_step < self.run.last_step
        state = "stopped" if stopped else "stopped early" if early else "done"
        self.report.end(self.step, state, evaluation, speed, self.test)
        folder = self.config.folder
        return Result(folder, self.step, evaluation, speed, stopped, early, self.test)

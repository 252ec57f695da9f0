"""Evaluates the net of a run between two of its steps, as it would be saved and used."""

from __future__ import annotations

import itertools
from typing import Iterable, Iterator, Optional

import mxnet as mx

from .. import dist
from ..batch_norm import running_statistics
from ..data import input_pipeline, randomness
from ..data.loader import Batch, EvalLoader
from ..data.sources.base import Source
from ..data.transform import as_images
from ..dist.preemption import StopRequest
from ..dist.watchdog import Watchdog
from ..model import mixed_precision, replica
from ..report.figures import Predicted
from ..report.report import Report
from ..step.evaluation import Evaluation, evaluate
from ..step.loss import cross_entropy
from .outcome import EvaluationEnd, Hooks, Stopped
from .start import Started

SHOWN_IMAGES = 16  # in TensorBoard's grid


class Evaluator:
    """Evaluates the net of a run, in float32, and calibrates its running statistics; collective.

    Where a ``stop`` is asked for, an evaluation ends between two batches: Stopped, on all ranks.
    """

    def __init__(
        self, run: Started, report: Report, watchdog: Watchdog, hooks: Hooks, stop: StopRequest
    ):
        self._run, self._report, self._watchdog, self._hooks = run, report, watchdog, hooks
        self._stop = stop

    def evaluate(self, step: int, last: bool) -> Optional[Evaluation]:
        """Evaluate the net after ``step`` steps on the validation set, or if the run has none on
        the test set, and report it; None if it has neither; collective.

        The ``last`` evaluation of a run is preceded by the calibration that its config asks for.
        """
        if last and self._run.config.calibrate_samples:
            self._calibrate(step)
        return self._evaluate(step, self._run.own.sets.watched)

    def test(self, step: int) -> Optional[Evaluation]:
        """The one look at the test set of a run that has a validation set; None without both."""
        sets = self._run.own.sets
        return None if sets.validation is None else self._evaluate(step, sets.test)

    def _evaluate(self, step: int, source: Optional[Source]) -> Optional[Evaluation]:
        if source is None:
            return None
        run, own, config = self._run, self._run.own, self._run.config
        name = "test" if source is own.sets.test else "validation"
        every = self._watched(input_pipeline.test_loader(source, config, own.ctx), step)
        batches = itertools.takewhile(lambda _: not self._stop.requested, every)
        loss, flip = run.loss or cross_entropy, config.evaluate.flip
        in_float32 = mixed_precision.computing_in(own.net, "float32")
        with run.ema.in_place(), in_float32, replica.as_one_model(own.net, config):
            found = evaluate(own.net, batches, own.num_classes, loss, run.metrics, flip)
            if dist.any_rank(self._stop.requested, "stop_in_evaluation"):
                raise Stopped
            self._watchdog.beat(f"the pictures of a pass after step {step}")
            shown = self._first_of(source) if dist.is_root() else None
        self._report.evaluation(step, found, name, shown)
        if self._hooks.on_evaluation is not None:
            self._watchdog.beat(f"on_evaluation after step {step}")
            self._hooks.on_evaluation(EvaluationEnd(step, name, found))
        return found

    def _calibrate(self, step: int) -> None:
        """Measure exact running statistics, on the batches of the steps after ``step``."""
        run, config = self._run, self._run.config
        steps = -(-config.calibrate_samples // config.train.global_batch_size)
        batches = self._watched(run.own.loader.from_step(step, step + steps), step)
        randomness.seed_step(config.seed, step, dist.rank(), run.draws)  # of dropout, as if resumed
        with run.ema.in_place(), mixed_precision.computing_in(run.net, "float32"):
            running_statistics.calibrate(run.net, ((b.data, b.samples) for b in batches))

    def _watched(self, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            self._watchdog.beat(f"batch {number} of a pass after step {step}")
            yield batch

    def _first_of(self, source: Source) -> Optional[Predicted]:
        """The first images of a set, with predictions; None if none of them can be read."""
        own, settings = self._run.own, self._run.config.data
        batch = EvalLoader(source, settings, batch_size=SHOWN_IMAGES).first()
        if batch is None:
            return None
        scores = own.net(mx.nd.array(batch.data, ctx=own.ctx))
        predicted = scores.argmax(axis=-1).asnumpy().astype(int)
        return Predicted(as_images(batch.data, settings), batch.label.astype(int), predicted)

"""Evaluates the net of a run between two of its steps, as it would be saved and used."""

from __future__ import annotations

from typing import Iterable, Iterator, Optional

import mxnet as mx

from .. import dist
from ..batch_norm import running_statistics
from ..data import input_pipeline
from ..data.loader import Batch, EvalLoader
from ..data.sources.base import Source
from ..data.transform import as_images
from ..dist.watchdog import Watchdog
from ..model import mixed_precision, replica
from ..report.report import Report
from ..step.evaluation import Evaluation, evaluate
from ..step.loss import cross_entropy
from .outcome import EvaluationEnd, Hooks
from .start import Started

SHOWN_IMAGES = 16  # in TensorBoard's grid


class Evaluator:
    """Evaluates the net of a run, in float32, and calibrates its running statistics; collective."""

    def __init__(self, run: Started, report: Report, watchdog: Watchdog, hooks: Hooks):
        self._own, self._config, self._hooks = run.own, run.config, hooks
        self._ema = run.ema
        self._loss, self._metrics = run.loss or cross_entropy, run.metrics
        self._report, self._watchdog = report, watchdog

    def evaluate(self, step: int, last: bool) -> Optional[Evaluation]:
        """Evaluate the net after ``step`` steps on the validation set, or if the run has none on
        the test set, and report it; None if it has neither; collective.

        The ``last`` evaluation of a run is preceded by the calibration that its config asks for.
        """
        if last and self._config.calibrate_samples:
            self._calibrate(step)
        return self._evaluate(step, self._own.sets.watched)

    def test(self, step: int) -> Optional[Evaluation]:
        """The one look at the test set of a run that has a validation set; None without both."""
        sets = self._own.sets
        return None if sets.validation is None else self._evaluate(step, sets.test)

    def _evaluate(self, step: int, source: Optional[Source]) -> Optional[Evaluation]:
        if source is None:
            return None
        own = self._own
        name = "test" if source is own.sets.test else "validation"
        batches = self._watched(input_pipeline.test_loader(source, self._config, own.ctx), step)
        in_float32 = mixed_precision.computing_in(own.net, "float32")
        with self._ema.in_place(), in_float32, replica.as_one_model(own.net, self._config):
            how = self._loss, self._metrics, self._config.evaluate.flip
            found = evaluate(own.net, batches, own.num_classes, *how)
            self._watchdog.beat(f"the pictures of a pass after step {step}")
            if dist.is_root():
                self._show_predictions(step, source, name)
        self._report.evaluation(step, found, name)
        if self._hooks.on_evaluation is not None:
            self._watchdog.beat(f"on_evaluation after step {step}")
            self._hooks.on_evaluation(EvaluationEnd(step, name, found))
        return found

    def _calibrate(self, step: int) -> None:
        """Measure exact running statistics, on the batches of the steps after ``step``."""
        steps = -(-self._config.calibrate_samples // self._config.train.global_batch_size)
        batches = self._watched(self._own.loader.from_step(step, step + steps), step)
        in_float32 = mixed_precision.computing_in(self._own.net, "float32")
        with self._ema.in_place(), in_float32:
            running_statistics.calibrate(self._own.net, ((b.data, b.samples) for b in batches))

    def _watched(self, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            self._watchdog.beat(f"batch {number} of a pass after step {step}")
            yield batch

    def _show_predictions(self, step: int, source: Source, name: str) -> None:
        settings = self._config.data
        batch = EvalLoader(source, settings, batch_size=SHOWN_IMAGES).first()
        if batch is None:
            return
        data = mx.nd.array(batch.data, ctx=self._own.ctx)
        predicted = self._own.net(data).argmax(axis=-1).asnumpy()
        images, labels = as_images(batch.data, settings), batch.label.astype(int)
        self._report.predictions(step, name, images, labels, predicted.astype(int))

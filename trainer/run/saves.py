"""Saves a run between two of its steps: the evaluated model, and what training goes on from.

Every call is collective.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from .. import checkpoint, dist
from ..checkpoint.saver import Saver
from ..dist.watchdog import Watchdog
from ..model import replica
from ..report.report import Report
from . import agreement, outcome
from .start import Started


class Saves:
    """The saves of a run, one under way at most; rank 0's ``saver`` writes them."""

    def __init__(self, run: Started, report: Report, watchdog: Watchdog):
        self._run, self._report, self._watchdog = run, report, watchdog
        folder, keep = run.config.checkpoint_folder, run.config.checkpoint.keep
        beat = functools.partial(watchdog.beat, "a save under way")
        self.saver = Saver(folder, keep, report.warning, report.checkpoint, beat)
        self.step = run.state.step if run.path else None  # that of the last save

    def begin(self, step: int, **known: Any) -> None:
        """Save the run after ``step`` steps; ``known`` are further fields of its state. Raises
        TrainingError: the ranks' weights have parted; they are never saved.
        """
        run, net, config = self._run, self._run.net, self._run.config
        sums = agreement.checksums(net)
        where = agreement.parted(sums)
        if where is not None:
            raise outcome.parted(config, step, where)
        statistics = replica.gather_statistics(net, config)
        ends = step % run.epoch_steps == 0 or step == run.last_step
        if statistics is not None and ends and step != self.step:  # once, as all points
            self._report.drift(step, replica.drift(net, statistics))
        self.step = step
        self._report.flush(step)
        self.wait()  # before copying: memory holds one copy at most
        with run.ema.in_place():
            averaged = replica.gather_statistics(net, config) if run.ema else None
            with replica.as_one_model(net, config):
                if dist.is_root():
                    sums = agreement.checksums(net) if run.ema else sums
                    weights, answers = agreement.of_weights(sums), run.own.answers()
                    known.update(step=step, weights=weights, answers=answers)
                    state, others = replace(run.origin, **known), run.ema.others()
                    content = net, run.trainer, state, statistics, averaged, others
                    self.saver.begin(checkpoint.snapshot(*content))

    def wait(self) -> None:
        """Wait for the save under way, if any, and have other watchdogs hear of it."""
        while dist.any_rank(not self.saver.ends_soon(), "save"):
            self._watchdog.beat("a save of rank 0's under way")
        self.saver.wait()

"""Measures the speed, the phases of a step and the memory of a configured run; saves nothing.

It starts as fit() does and makes the same steps, without reports, evaluations and checkpoints.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import resource
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Tuple

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import dist
from ..config import Config
from ..data import input_pipeline, randomness
from ..data.loader import Batch
from ..dist import environment
from ..dist.preemption import StopRequest
from ..dist.watchdog import Watchdog
from ..model import mixed_precision
from ..step import shared_gradients
from ..step.evaluation import evaluate
from ..step.gradients import gradients
from ..step.metrics import TrainMetrics
from ..step.schedule import set_lr
from ..step.step import train_step
from ..step.timing import PARTS, Mark, StepClock, unmarked
from . import start

PERCENTILES = (10, 50, 90)
LOADER_STEPS = 5  # batches made per measured step: they take less time
TRACED_STEPS = 3
SMALL_SUMS = 100
PHASES = ("data", *PARTS, "other")  # of a synchronised step


@dataclass(frozen=True)
class Figures:
    """What was measured, over all ranks; speeds in images per second."""

    ranks: int
    device: str
    steps: int
    training: float
    training_percentiles: Dict[str, float]  # of single steps
    step: float  # seconds of a step of training, mean
    synchronised: float  # training, waiting for the device after every phase
    loader: float  # making batches alone
    evaluation: float
    phases: Dict[str, float]  # seconds of a synchronised step, mean over steps and ranks
    small_sum: float  # seconds of a sum over ranks as a synced batch norm needs, median
    gradient_bytes: int  # of each rank, in a step
    peak_mib: List[float]  # resident memory of each rank, by rank

    @property
    def headroom(self) -> float:
        """Speed of the loader over speed of training."""
        return self.loader / self.training

    @property
    def hidden(self) -> float:
        """The share of the allreduce that a step of training hides behind computing, 0 to 1."""
        allreduce = self.phases["allreduce"]
        computing = sum(self.phases.values()) - allreduce - self.phases["ranks"]
        return min(1.0, max(0.0, 1 - (self.step - computing) / allreduce)) if allreduce else 1.0


def measure(config: Config, steps: int, warmup: int, traces: Optional[Path] = None) -> Figures:
    """Measure on every rank the launcher started, or on this process alone; collective.

    At least two ``steps`` of each kind, after ``warmup`` ones that do not count; then a few more,
    of which there are ``traces``, in a folder that is created if necessary.
    """
    if traces is not None:
        dist.allow_timeline()
    with contextlib.ExitStack() as until_closed:
        seconds = config.train.watchdog_seconds
        watchdog = until_closed.enter_context(Watchdog(seconds, environment.where()))
        watchdog.beat("the rendezvous of all ranks")
        data = start.join(config, lambda: input_pipeline.read(config.data, seed=config.seed))
        started = start.start(None, config, None, data, lambda *_: (config, None), until_closed)
        bench = _Bench(started, watchdog)
        times, images = bench.train(steps, warmup)
        phases, synchronised = bench.train_synchronised(steps)
        small_sum = bench.small_sum()
        loader = bench.make_batches(LOADER_STEPS * steps)
        evaluation = bench.evaluate(steps)
        # Before the traces, which are kept in memory until they are written.
        peaks = dist.gather_objects(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        if traces is not None:
            bench.trace(traces)
    return Figures(
        ranks=dist.world_size(),
        device=str(started.own.ctx),
        steps=steps,
        training=sum(images) / sum(times),
        training_percentiles=percentiles([n / s for n, s in zip(images, times)]),
        step=sum(times) / len(times),
        synchronised=synchronised,
        loader=loader,
        evaluation=evaluation,
        phases=phases,
        small_sum=small_sum,
        gradient_bytes=sum(
            array.size * np.dtype(array.dtype).itemsize for array in gradients(started.trainer)
        ),
        peak_mib=peaks,
    )


def percentiles(speeds: List[float]) -> Dict[str, float]:
    """The 10th, 50th and 90th percentile of ``speeds``, by percentage."""
    return {str(p): float(np.percentile(speeds, p)) for p in PERCENTILES}


class _Bench:
    """The parts of a run, and the number of the next step."""

    def __init__(self, started: start.Started, watchdog: Watchdog):
        self._run, self._watchdog = started, watchdog
        self._draws = started.draws
        self._step = 0
        self._stop = StopRequest()
        self._metrics = TrainMetrics(started.own.ctx)

    def train(self, steps: int, warmup: int) -> Tuple[List[float], List[int]]:
        """Seconds and images of each step but the first, unsynchronised as in a run.

        A thread notes when each loss is ready, so that the host does not wait for any.
        """
        batches = self._batches(warmup + steps)
        for batch in itertools.islice(batches, warmup):
            self._train_step(batch)
        mx.nd.waitall()
        dist.barrier()
        losses: queue.SimpleQueue[mx.nd.NDArray] = queue.SimpleQueue()
        ends: List[float] = []
        images: List[int] = []

        def watch() -> None:
            for _ in range(steps):
                losses.get().wait_to_read()
                ends.append(time.perf_counter())

        watcher = threading.Thread(target=watch, name="step ends", daemon=True)
        watcher.start()
        for batch in batches:
            losses.put(self._train_step(batch))
            images.append(batch.global_samples)
        mx.nd.waitall()
        watcher.join()
        return np.diff(ends).tolist(), images[1:]

    def train_synchronised(self, steps: int) -> Tuple[Dict[str, float], float]:
        """Seconds of a step by phase, and images per second, waiting after every phase."""
        images = 0
        batches = self._batches(steps)
        dist.barrier()
        clock = StepClock()

        def mark(part: str) -> None:
            if part == "ranks":
                dist.barrier()
            clock.mark(part)

        for batch in batches:
            clock.mark("data")
            self._train_step(batch, mark)
            images += batch.global_samples
            clock.mark("other")
        clock.mark("data")
        ranks = dist.gather_objects(dict(clock.seconds))
        phases = {
            phase: sum(seconds[phase] for seconds in ranks) / len(ranks) / steps for phase in PHASES
        }
        return phases, images / steps / sum(phases.values())

    def small_sum(self) -> float:
        """Seconds of a sum of 129 float64 over ranks: of a norm of 64 channels; median."""
        values, seconds = np.zeros(129), []
        for _ in range(SMALL_SUMS):
            began = time.perf_counter()
            dist.allreduce_sum(values, "bench.small_sum")
            seconds.append(time.perf_counter() - began)
        return float(np.median(seconds))

    def make_batches(self, steps: int) -> float:
        """Images a second that the loaders of all ranks make while nothing else runs."""
        batches = self._run.own.loader.from_step(self._step, self._step + steps)
        next(batches).data.wait_to_read()  # the thread has started
        dist.barrier()
        images, began = 0, time.perf_counter()
        for batch in batches:
            batch.data.wait_to_read()
            images += batch.samples
        own = images / (time.perf_counter() - began)
        return float(sum(dist.gather_objects(own)))

    def evaluate(self, steps: int) -> float:
        """Images a second of inference, on ``steps`` batches of the test set or what there is."""
        own = self._run.own
        source = own.sets.watched or own.sets.train
        with mixed_precision.computing_in(own.net, "float32"):
            for number in (1, steps):  # the first pass builds the graph
                batches = input_pipeline.test_loader(source, self._run.config, own.ctx)
                mx.nd.waitall()
                dist.barrier()
                began = time.perf_counter()
                seen = evaluate(own.net, self._watched(batches, number), own.num_classes)
                speed = seen.samples / (time.perf_counter() - began)
        return speed

    def trace(self, folder: Path) -> None:
        """Trace a few steps, in Chrome's trace format (chrome://tracing).

        Each rank writes ``mxnet-rank<N>.json``: the operators of the engine and the allreduce of
        gradients. Where gradients go through Horovod, rank 0 writes ``horovod.json``: the phases of
        every collective and when each rank was ready for it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"mxnet-rank{dist.rank()}.json"
        mx.profiler.set_config(
            profile_symbolic=True,
            profile_imperative=True,
            profile_api=False,
            profile_memory=False,
            filename=str(own),
        )
        net, config = self._run.net, self._run.config
        if isinstance(net, gluon.HybridBlock) and config.model.hybridize:
            # Otherwise the engine, and so the trace, sees many operators as one.
            net.hybridize(static_alloc=True, forward_bulk_size=0, backward_bulk_size=0)
        for batch in self._batches(1):
            self._train_step(batch)
        mx.nd.waitall()
        in_memory = shared_gradients.wanted(config.optimizer) and dist.ranks_share_memory()
        timeline = contextlib.nullcontext if in_memory else dist.timeline
        allreduce = mx.profiler.Domain("ranks").new_task("allreduce of gradients")
        marks = {"ranks": allreduce.start, "allreduce": allreduce.stop}
        with timeline(str(folder / "horovod.json")):
            mx.profiler.set_state("run")
            for batch in self._batches(TRACED_STEPS):
                self._train_step(batch, lambda part: marks[part]() if part in marks else None)
            mx.nd.waitall()
            mx.profiler.set_state("stop")
        mx.profiler.dump()

    def _train_step(self, batch: Batch, mark: Mark = unmarked) -> mx.nd.NDArray:
        """One step as fit() makes it; returns its loss."""
        run, config = self._run, self._run.config
        randomness.seed_step(config.seed, self._step, dist.rank(), self._draws)
        set_lr(run.trainer, config, self._step, run.epoch_steps)
        result = train_step(run.net, run.trainer, batch, config, mark=mark, scale=run.scale)
        self._metrics.add(self._step, result, batch.samples)
        self._stop.agreed()
        self._step += 1
        run.ema.after(self._step)
        return result.loss_sum

    def _batches(self, steps: int) -> Iterator[Batch]:
        return self._watched(self._run.own.loader.from_step(self._step, self._step + steps), steps)

    def _watched(self, batches: Iterable[Batch], steps: int) -> Iterator[Batch]:
        for number, batch in enumerate(itertools.islice(batches, steps)):
            self._watchdog.beat(f"batch {number} of {steps}")
            yield batch

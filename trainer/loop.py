"""fit(): the way through a run, and the only file that sees all its parts.

config -> ranks -> device -> data -> net -> checkpoint -> steps -> evaluation -> checkpoint.
"""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import batch_norm, checkpoint, dist, fashion_mnist, model, sharding, summary
from . import config as config_module
from .config import Config
from .device import choose
from .evaluation import evaluate
from .loader import EvalLoader, TrainLoader
from .metrics import Evaluation, NonFiniteLossError, TrainMetrics
from .monitor import Monitor
from .optim import make_trainer, set_lr
from .preemption import StopRequest
from .progress import ProgressDisplay
from .step import train_step
from .throughput import WARMUP_STEPS, Throughput
from .watchdog import Watchdog

Arrays = Tuple[np.ndarray, np.ndarray]  # images uint8 (N, H, W), labels integer (N,)

SHOWN_IMAGES = 32  # in TensorBoard's grid


class Result(NamedTuple):
    """How a run ended."""

    folder: Path
    steps: int
    evaluation: Optional[Evaluation]  # of the test set; None where the run was stopped before it
    images_per_second: Optional[float]  # of all ranks, without warm-up and pauses
    stopped: bool  # asked to stop before its end; it goes on from its checkpoint


class TrainingError(RuntimeError):
    """The run cannot go on: why, and where it stands."""


def fit(
    net: Optional[gluon.Block] = None,
    config: Optional[Config] = None,
    *,
    resume: str = "auto",
    force: bool = False,
    train: Optional[Arrays] = None,
    test: Optional[Arrays] = None,
) -> Result:
    """Train ``net`` on every rank that the launcher started, or on this process alone.

    Args:
        net: any Gluon block that takes float32 (B, 1, H, W) and gives logits (B, K); initialised
            or not. None builds what ``config.model`` says. It is trained in place.
        config: every setting; None takes the defaults.
        resume: ``auto`` goes on from the newest whole checkpoint of the run's folder, ``none``
            starts anew (what the run's folder held is kept under another name), anything else
            is a checkpoint to go on from.
        force: go on although settings differ from those the checkpoint was made with.
        train, test: images, uint8 (N, H, W), and labels, integer (N,); None reads what
            ``config.data`` says.

    Raises:
        ConfigError, DataError, CheckpointError: bad input, before anything is written.
        TrainingError: the loss is not finite.
    """
    config = config or Config()
    dist.init()
    return _Run(net, config, resume, force, train, test).go()


class _Run:
    """One call of :func:`fit`: what its stages share."""

    def __init__(
        self,
        net: Optional[gluon.Block],
        config: Config,
        resume: str,
        force: bool,
        train: Optional[Arrays],
        test: Optional[Arrays],
    ):
        self.config = config
        self.progress: Optional[ProgressDisplay] = None
        self.ctx = choose(config.device, dist.local_rank())
        source = (config.data.folder, config.data.dataset)
        images, labels = train or fashion_mnist.load("train", *source)
        self.test = test or fashion_mnist.load("test", *source)
        self.loader = TrainLoader(
            images,
            labels,
            config.data,
            global_batch_size=config.train.global_batch_size,
            seed=config.seed,
            rank=dist.rank(),
            world_size=dist.world_size(),
            place=functools.partial(mx.nd.array, ctx=self.ctx),
        )
        self.train_size = len(labels)
        self.net = net if net is not None else model.build(config.model)
        self.layers = prepare(self.net, config, self.loader.shape, self.ctx)
        self.trainer = make_trainer(self.net, config.optimizer)
        self.shard_size = len(
            sharding.shard(
                np.arange(config.train.global_batch_size), dist.rank(), dist.world_size()
            )
        )
        self.epoch_steps = self.loader.steps_per_epoch
        self.last_step = config.train.epochs * self.epoch_steps
        if config.train.max_steps is not None:
            self.last_step = min(self.last_step, config.train.max_steps)
        self.checkpoints = config.folder / "checkpoints"
        state = self._resume(resume, force)
        self.step: int = state["step"]
        self.metrics = TrainMetrics(self.ctx, state["totals"])
        self.evaluation: Optional[Evaluation] = None
        self.throughput = Throughput()
        if dist.is_root():
            config.folder.mkdir(parents=True, exist_ok=True)
            (config.folder / "config.yaml").write_text(config_module.as_yaml(config))
        enabled = dist.is_root() and config.monitor.tensorboard
        self.monitor = Monitor(config.folder / "events", self.step, enabled)

    def _resume(self, resume: str, force: bool) -> Dict[str, Any]:
        """The state to go on from, with its arrays in place on every rank."""
        path: Optional[Path] = None
        if resume == "auto":
            # One rank looks, so that all take the same one.
            path = checkpoint.find_latest(self.checkpoints, _warn) if dist.is_root() else None
            path = dist.broadcast_object(path)
        elif resume != "none":
            path = Path(resume)
            wrong = checkpoint.problem(path)
            if wrong is not None:
                raise checkpoint.CheckpointError(f"cannot resume: {wrong}")
        if path is None:
            if dist.is_root():
                _set_aside(self.config.folder)
            return {"step": 0, "totals": [[0.0] * 3] * 2}
        state = checkpoint.read_state(path)
        changed = config_module.differences(state["config"], config_module.to_dict(self.config))
        if changed and not force:
            raise checkpoint.CheckpointError(
                f"{path} was made with other settings ({'; '.join(changed)}); give the run another "
                "name=..., start it anew with --resume none, or go on all the same with --force"
            )
        checkpoint.restore(path, self.net, self.trainer)
        self._say(f"goes on from {path}")
        return state

    def go(self) -> Result:
        config = self.config
        if dist.is_root():
            self.progress = ProgressDisplay(self.step, self.last_step)
        self._introduce()
        watchdog = Watchdog(config.train.watchdog_seconds, dist.rank())
        with watchdog, StopRequest() as stop:
            try:
                stopped = self._train(watchdog, stop)
                if not stopped and self.evaluation is None:
                    watchdog.beat("the evaluation")
                    self._evaluate()
            except NonFiniteLossError as error:
                raise self._non_finite(error) from error
            finally:
                if self.progress:
                    self.progress.close()
                self.monitor.flush()
        return self._finish(stopped)

    def _train(self, watchdog: Watchdog, stop: StopRequest) -> bool:
        """Make the steps that are left; whether it was asked to stop before the last."""
        config = self.config
        batches = self.loader.from_step(self.step, self.last_step)
        for made, batch in enumerate(batches, start=1):
            watchdog.beat(f"step {self.step}")
            mx.random.seed(sharding.step_seed(config.seed, self.step, dist.rank()))
            lr = set_lr(self.trainer, config, self.step, self.epoch_steps)
            due = self._due(config.monitor.every_steps, offset=1)
            result = train_step(self.net, self.trainer, batch, config, want_norm=due)
            self.metrics.add(self.step, result, batch.samples)
            self.step += 1
            self.throughput.step(batch.global_samples)
            if made == WARMUP_STEPS:
                mx.nd.waitall()
                self.throughput.begin()
            if due:
                self._report(lr, result.gradient_norm)
            if self.progress:
                self.progress.step(self.step)
            if self._due(self.epoch_steps):
                self._end_epoch(watchdog)
                self.throughput.begin()
            elif self._due(config.checkpoint.every_steps):
                self._save()
                self.throughput.begin()
            if stop.agreed() and self.step < self.last_step:
                self._save()
                return True
        return False

    def _due(self, every: Optional[int], offset: int = 0) -> bool:
        """Whether something that happens each ``every`` steps happens now; the last step always."""
        step = self.step + offset
        return every is not None and (step % every == 0 or step == self.last_step)

    def _report(self, lr: float, norm: Optional[mx.nd.NDArray]) -> None:
        means = self.metrics.read()
        self.throughput.end()
        speed = self.throughput.read()
        self.throughput.begin()
        scalars = {
            "loss": means.loss,
            "accuracy": means.accuracy,
            "lr": lr,
            "gradient_norm": float(norm.asscalar()) if norm is not None else None,
        }
        self.monitor.scalars("train", scalars, self.step)
        self.monitor.scalars("speed", {"images_per_second": speed}, self.step)
        if self.progress:
            epoch = -(-self.step // self.epoch_steps)
            shown = f"  {speed:.0f} images/s" if speed else ""
            self.progress.figures(
                self.step,
                f"epoch {epoch}/{self.config.train.epochs}  loss {means.loss:.4f}  "
                f"accuracy {means.accuracy:.4f}{shown}",
            )

    def _end_epoch(self, watchdog: Watchdog) -> None:
        epoch = -(-self.step // self.epoch_steps)
        means = self.metrics.read_epoch()
        self.throughput.end()
        self.monitor.scalars("epoch", {"loss": means.loss, "accuracy": means.accuracy}, self.step)
        self._say(f"epoch {epoch}: training loss {means.loss:.4f}  accuracy {means.accuracy:.4f}")
        every = self.config.evaluate.every_epochs
        self.evaluation = None
        if self.step == self.last_step or (every and epoch % every == 0):
            watchdog.beat("the evaluation")
            self._evaluate()
        self._save()

    def _evaluate(self) -> None:
        config = self.config
        if config.batch_norm != "sync":
            batch_norm.merge_running_statistics(self.net, self.shard_size)
        batches = EvalLoader(
            *self.test,
            config.data,
            batch_size=config.evaluate.batch_size,
            rank=dist.rank(),
            world_size=dist.world_size(),
            place=functools.partial(mx.nd.array, ctx=self.ctx),
        )
        self.evaluation = evaluate(self.net, batches, self._num_classes())
        names = self._class_names()
        self.monitor.evaluation(self.evaluation, names, self.step)
        if dist.is_root():
            self._show_predictions(names)
        seen = self.evaluation
        self._say(
            f"test loss {seen.loss:.4f}  accuracy {seen.accuracy:.4f}  ({seen.samples} images)"
        )

    def _save(self) -> None:
        if self.config.batch_norm != "sync":
            batch_norm.merge_running_statistics(self.net, self.shard_size)
        # Every rank reads its sums here, so that a loss that is not finite is never saved.
        totals = self.metrics.totals()
        self.throughput.end()
        state = {
            "step": self.step,
            "totals": totals,
            "accuracy": self.evaluation.accuracy if self.evaluation else None,
            "config": config_module.to_dict(self.config),
        }
        self.monitor.flush()
        if dist.is_root():
            keep = self.config.checkpoint.keep
            checkpoint.save(self.checkpoints, self.net, self.trainer, state, keep)

    def _introduce(self) -> None:
        config, world_size = self.config, dist.world_size()
        self._say(
            f"{config.folder}: {self.train_size} training and {len(self.test[1])} test images, "
            f"{config.train.epochs} epochs of {self.epoch_steps} steps\n"
            f"{world_size} rank{'s' if world_size > 1 else ''} on {self.ctx}, global batch "
            f"{config.train.global_batch_size}, {config.train.global_batch_size / world_size:g} "
            f"a rank, batch norm {config.batch_norm}; MXNet {mx.__version__}"
        )
        if dist.is_root():
            self.monitor.start(config, summary.as_markdown(self.layers))

    def _finish(self, stopped: bool) -> Result:
        evaluation, speed = self.evaluation, self.throughput.overall
        if evaluation and not stopped:
            self.monitor.hyper_parameters(self.config, evaluation.scalars())
        self.monitor.close()
        mx.nd.waitall()
        folder = self.config.folder
        if stopped:
            self._say(f"stopped at step {self.step} of {self.last_step}, as asked; saved")
        elif evaluation:
            shown = f", {speed:.0f} images/s" if speed else ""
            self._say(f"done: test accuracy {evaluation.accuracy:.4f}{shown}; all is in {folder}")
        return Result(folder, self.step, evaluation, speed, stopped)

    def _non_finite(self, error: NonFiniteLossError) -> TrainingError:
        saved = checkpoint.listing(self.checkpoints)
        last = f"the last good checkpoint is {saved[-1]}" if saved else "nothing was saved before"
        return TrainingError(
            f"the loss was not finite at step {error.step}; {last}. "
            "Lower optimizer.lr, lengthen schedule.warmup_epochs or set optimizer.clip_norm"
        )

    def _num_classes(self) -> int:
        return int(self.test[1].max()) + 1

    def _class_names(self) -> List[str]:
        if self.config.data.dataset == "idx":
            return [str(label) for label in range(self._num_classes())]
        return list(fashion_mnist.CLASS_NAMES)

    def _show_predictions(self, names: List[str]) -> None:
        images, labels = (array[:SHOWN_IMAGES] for array in self.test)
        loader = EvalLoader(images, labels, self.config.data, batch_size=SHOWN_IMAGES)
        (batch,) = loader
        predicted = self.net(mx.nd.array(batch.data, ctx=self.ctx)).argmax(axis=-1).asnumpy()
        self.monitor.predictions(images, labels, predicted.astype(int), names, self.step)

    def _say(self, text: str) -> None:
        if self.progress:
            self.progress.line(text)
        elif dist.is_root():
            print(text, flush=True)


def prepare(
    net: gluon.Block, config: Config, shape: Tuple[int, int, int], ctx: mx.Context
) -> List[summary.Row]:
    """Bring ``net`` to ``ctx``, with the asked batch norm and the same weights on all ranks.

    Args:
        shape: (channels, height, width) of a sample.

    Returns:
        Its layers.
    """
    # Every rank draws the same weights; the broadcast below covers nets that were initialised
    # before, each rank's in its own way.
    mx.random.seed(config.seed)
    np.random.seed(config.seed)
    initialize(net, ctx)
    if config.batch_norm == "sync":
        batch_norm.convert_sync_batch_norm(net)
    elif config.batch_norm == "group":
        batch_norm.convert_sync_batch_norm(net, process_set=dist.node_process_set())
    # Deferred shapes are settled here, on all ranks: Horovod would broadcast them at the first
    # forward, and a forward on one rank alone would wait for ever.
    layers = summary.summarize(net, mx.nd.zeros((1, *shape), ctx=ctx))
    dist.broadcast_parameters(net.collect_params().values())
    if config.model.hybridize and isinstance(net, gluon.HybridBlock):
        net.hybridize(static_alloc=True)
    return layers


def initialize(net: gluon.Block, ctx: mx.Context) -> None:
    """Draw the weights (Xavier, as the book does) that nobody has drawn yet; move the others."""
    parameters = net.collect_params()
    for parameter in parameters.values():
        try:
            parameter.reset_ctx(ctx)
        except ValueError:  # not initialised
            parameter.initialize(default_init=mx.init.Xavier(), ctx=ctx)


def _set_aside(folder: Path) -> None:
    """Keep what an earlier run left in ``folder`` under the next free name beside it."""
    if folder.exists():
        number = next(n for n in itertools.count(1) if not Path(f"{folder}.{n}").exists())
        folder.rename(f"{folder}.{number}")
        print(f"{folder} held an earlier run, now in {folder}.{number}", flush=True)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)

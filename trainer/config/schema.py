"""Every setting of a run: its meaning, its default and what it may be.

A preset in ``configs/`` holds only what differs from these defaults. Every error is one line
(:class:`ConfigError`), before anything is started or written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from ..errors import ConfigError
from .data_settings import Data
from .settings import Checked, setting

BUCKET_MB = 4.0  # python -m benchmarks.speed --only buckets_10gbit,buckets_1gbit

# Settings of older versions, which changed rounding alone: what to say where one is still given.
REMOVED = {
    "optimizer.groups": "gradients are reduced in buckets of optimizer.bucket_mb megabytes, whose "
    "results are the same in every run; leave optimizer.groups out"
}


@dataclass(frozen=True)
class Model(Checked, section="model."):
    """The net."""

    factory: str = setting(
        "trainer.model:resnet18", "package.module:function that returns a Gluon Block"
    )
    arguments: Dict[str, Any] = setting({}, "keyword arguments of the factory, e.g. {stem: small}")
    hybridize: bool = setting(True, "compile the net if it is a HybridBlock")
    weights: Optional[str] = setting(
        None,
        "a .params file (net.save_parameters, gluon.model_zoo) that training starts from; "
        "parameters of another shape, such as the last layer's for other classes, start anew",
    )


@dataclass(frozen=True)
class Optimizer(Checked, section="optimizer."):
    """The update rule, and how gradients are reduced over ranks."""

    name: str = setting("sgd", "any optimizer registered in MXNet: sgd, nag, adam, lamb, ...")
    lr: float = setting(0.1, "peak learning rate (see base_batch_size)", above=0)
    base_batch_size: Optional[int] = setting(
        None, "lr is multiplied by global_batch_size / base_batch_size; null: it is not", minimum=1
    )
    momentum: float = setting(0.9, "of sgd and nag", minimum=0, below=1)
    nesterov: bool = setting(False, "Nesterov momentum with sgd (MXNet's nag)")
    weight_decay: float = setting(
        0.0, "decay of weights per step, times the learning rate", minimum=0
    )
    decay_norm_and_bias: bool = setting(False, "also decay gamma, beta and biases")
    arguments: Dict[str, Any] = setting({}, "further arguments of MXNet's optimizer")
    clip_norm: Optional[float] = setting(
        None, "clip the global batch's gradient to this L2 norm; null: no clipping", above=0
    )
    accumulate: int = setting(1, "micro-batches per step, to save memory", minimum=1)
    fp16_allreduce: bool = setting(
        False, "reduce gradients in float16 (pays off on slow links only)"
    )
    bucket_mb: float = setting(
        BUCKET_MB,
        "megabytes of gradients that are reduced over the network together, while backward goes "
        "on; a bucket ends with the parameter that fills it",
        above=0,
    )
    shared_memory: bool = setting(
        True,
        "reduce gradients in shared memory if all ranks are on the CPUs of one node; otherwise "
        "Horovod does, in buckets",
    )


@dataclass(frozen=True)
class Schedule(Checked, section="schedule."):
    """The learning rate over a run, a function of the step alone."""

    name: str = setting(
        "cosine", "course after the warm-up", choices=("constant", "step", "cosine")
    )
    warmup_epochs: float = setting(0.0, "epochs of linear increase from 0 to lr", minimum=0)
    milestones: Tuple[float, ...] = setting((), "step: epochs at which lr is multiplied by gamma")
    gamma: float = setting(0.1, "step: the factor", above=0)
    final_lr: float = setting(0.0, "cosine: final value, as a share of lr", minimum=0)


@dataclass(frozen=True)
class Train(Checked, section="train."):
    """Length, batch size and precision of training."""

    epochs: int = setting(10, "passes over the training set", minimum=1)
    global_batch_size: int = setting(128, "samples per step, over all ranks", minimum=1)
    max_steps: Optional[int] = setting(
        None,
        "stop after so many steps (the schedule keeps its full length)",
        minimum=1,
    )
    patience: Optional[int] = setting(
        None,
        "early stopping: end after so many evaluations in a row without a higher test accuracy "
        "(the schedule keeps its full length); null: never",
        minimum=1,
    )
    label_smoothing: float = setting(
        0.0, "share of a label spread over all classes", minimum=0, below=1
    )
    watchdog_seconds: float = setting(
        600.0, "a rank without progress for so long prints its stacks and ends the job", above=0
    )
    precision: str = setting(
        "float32",
        "of the products in convolutions and dense layers in training; bfloat16 pays off on CPUs "
        "with AVX512_BF16 and large images. Weights, sums and evaluation stay float32",
        choices=("float32", "bfloat16"),
    )


@dataclass(frozen=True)
class Evaluate(Checked, section="evaluate."):
    """When the test set is evaluated."""

    every_epochs: int = setting(1, "epochs between evaluations; 0: only at the end", minimum=0)
    batch_size: int = setting(250, "test samples per batch of a rank", minimum=1)


@dataclass(frozen=True)
class Checkpoint(Checked, section="checkpoint."):
    """When the run is saved."""

    every_steps: Optional[int] = setting(
        None, "steps between checkpoints, besides the one after each epoch; null: none", minimum=1
    )
    keep: int = setting(2, "newest checkpoints kept, besides the best", minimum=1)


@dataclass(frozen=True)
class Monitor(Checked, section="monitor."):
    """Logging."""

    every_steps: int = setting(
        20, "steps between log lines, and between points in TensorBoard", minimum=1
    )
    tensorboard: bool = setting(True, "rank 0 writes TensorBoard event files")
    histograms_every_epochs: int = setting(
        1, "epochs between histograms of weights and gradients in TensorBoard; 0: none", minimum=0
    )
    log_format: str = setting(
        "text", "what rank 0 prints: text, or one JSON object per line", choices=("text", "json")
    )


@dataclass(frozen=True)
class Config(Checked):
    """A run."""

    seed: int = setting(
        0, "seed of weights, sample order, augmentation and dropout", minimum=0, below=2**31
    )
    output: str = setting("runs", "folder of all runs (~ and ${VARIABLE} are expanded)", path=True)
    name: str = setting("default", "of the run, and of its folder in output")
    device: str = setting(
        "auto",
        "auto: the GPU numbered as the local rank, else the CPU",
        choices=("auto", "cpu", "gpu"),
    )
    batch_norm: str = setting(
        "local",
        "over the samples of all ranks (sync), of the ranks of a node (group), of a rank (local)",
        choices=("sync", "group", "local"),
    )
    calibrate_samples: int = setting(
        0,
        "training samples from which batch norm's running statistics are recomputed before the "
        "last evaluation; 0: they are not",
        minimum=0,
    )
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    monitor: Monitor = field(default_factory=Monitor)

    @property
    def folder(self) -> Path:
        """Where the run keeps its checkpoints, events and resolved config."""
        return Path(self.output) / self.name

    @property
    def checkpoint_folder(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_together(self)


# Settings that do not influence the result, and so may change when a run is resumed.
_FREE_TO_CHANGE = re.compile(
    r"(output|name|device|evaluate\..*|checkpoint\..*|monitor\..*"
    r"|data\.(folder|class_names|bad_samples|workers|prefetch)"
    r"|train\.(max_steps|patience|watchdog_seconds)"
    r"|optimizer\.(fp16_allreduce|shared_memory|bucket_mb)|model\.hybridize)"
)


def decides_result(name: str) -> bool:
    """Whether the setting of that dotted name influences the result of a run."""
    return not _FREE_TO_CHANGE.fullmatch(name) and name not in REMOVED


def _check_together(config: Config) -> None:
    """Checks that involve several settings."""
    schedule, train = config.schedule, config.train
    if schedule.warmup_epochs > train.epochs:
        raise ConfigError(
            f"schedule.warmup_epochs is {schedule.warmup_epochs:g}; "
            f"it must be at most train.epochs, {train.epochs}"
        )
    if train.patience is not None and config.evaluate.every_epochs == 0:
        raise ConfigError(
            f"train.patience is {train.patience}, and evaluate.every_epochs=0 evaluates only at "
            "the end; set evaluate.every_epochs=1, or train.patience=null"
        )
    if schedule.name == "step" and not schedule.milestones:
        raise ConfigError("schedule.name is step; schedule.milestones must say when, e.g. [30, 60]")
    if schedule.name != "step" and schedule.milestones:
        raise ConfigError(
            f"schedule.milestones is {list(schedule.milestones)}; "
            f"it goes with schedule.name=step, not {schedule.name}"
        )
    if list(schedule.milestones) != sorted(set(schedule.milestones)):
        raise ConfigError(
            f"schedule.milestones is {list(schedule.milestones)}; they must rise, none twice"
        )
    if config.optimizer.nesterov and config.optimizer.name != "sgd":
        raise ConfigError(
            f"optimizer.nesterov goes with optimizer.name=sgd, not {config.optimizer.name}"
        )
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", config.model.factory):
        raise ConfigError(
            f"model.factory is {config.model.factory!r}; it must read package.module:function"
        )
    if not config.name or "/" in config.name or config.name in (".", "..") or "\0" in config.name:
        raise ConfigError(f"name is {config.name!r}; it must be the name of a folder, without /")

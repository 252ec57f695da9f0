"""Every setting of a run: its meaning, its default and what it may be.

A preset in ``configs/`` holds only what differs from these defaults. Every error is one line
(:class:`ConfigError`), before anything is started or written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from . import together
from .data_settings import Data
from .settings import Checked, setting

BUCKET_MB = 4.0  # python -m benchmarks.speed --only buckets_10gbit,buckets_1gbit

# Settings that hold a mapping, whose keys are no settings.
MAPPINGS = ("model.arguments", "optimizer.arguments", "optimizer.lr_mult")

# Schedules that are the same in each step however long the run is.
ANY_LENGTH = ("constant", "step", "plateau")

# Settings of older versions, of no influence on results: what to say where one is still given.
REMOVED = {
    "monitor.tensorboard": "monitor.loggers lists what is written, [tensorboard] by default; for "
    "none give monitor.loggers=[]",
    "optimizer.groups": "gradients are reduced in buckets of optimizer.bucket_mb megabytes, whose "
    "results are the same in every run; leave optimizer.groups out",
}


@dataclass(frozen=True)
class Model(Checked, section="model."):
    """The net."""

    factory: str = setting(
        "trainer.model:resnet18", "package.module:function that returns a Gluon Block"
    )
    arguments: Dict[str, Any] = setting(
        {}, "the factory's arguments, e.g. {stem: small}; texts like numbers in quotes"
    )
    hybridize: bool = setting(True, "compilation of the net, if it is a HybridBlock")
    weights: Optional[str] = setting(
        None,
        "a .params file (net.save_parameters, gluon.model_zoo) that training starts from; "
        "parameters of another shape, such as the last layer's for other classes, start anew",
        path=True,
    )


@dataclass(frozen=True)
class Optimizer(Checked, section="optimizer."):
    """The update rule, and how gradients are reduced over ranks."""

    name: str = setting("sgd", "any optimizer registered in MXNet: sgd, nag, adam, lamb, ...")
    lr: float = setting(0.1, "peak learning rate (see base_batch_size)", above=0)
    base_batch_size: Optional[int] = setting(
        None, "lr is multiplied by global_batch_size / base_batch_size; null: it is not", minimum=1
    )
    momentum: float = setting(0.9, "momentum of sgd and nag", minimum=0, below=1)
    nesterov: bool = setting(False, "Nesterov momentum with sgd (MXNet's nag)")
    weight_decay: float = setting(
        0.0, "decay of weights per step, times the learning rate", minimum=0
    )
    lr_mult: Dict[str, Any] = setting(
        {},
        "factors of lr by patterns of parameters' names in the net, of which the last that fits "
        'counts, e.g. {"features.*": 0.1}',
    )
    decay_norm_and_bias: bool = setting(False, "decay of gamma, beta and biases as well")
    arguments: Dict[str, Any] = setting({}, "further arguments of MXNet's optimizer")
    clip_norm: Optional[float] = setting(
        None, "largest L2 norm of the global batch's gradient; null: no clipping", above=0
    )
    accumulate: int = setting(1, "micro-batches per step, to save memory", minimum=1)
    fp16_allreduce: bool = setting(
        False, "reduction of gradients in float16 (pays off on slow links only)"
    )
    bucket_mb: float = setting(
        BUCKET_MB,
        "megabytes of gradients that are reduced over the network together, while backward goes "
        "on; a bucket ends with the parameter that fills it",
        above=0,
    )
    shared_memory: bool = setting(
        True,
        "reduction of gradients in shared memory, if all ranks are on the CPUs of one node; "
        "otherwise Horovod reduces them, in buckets",
    )


@dataclass(frozen=True)
class Schedule(Checked, section="schedule."):
    """The learning rate over a run, a function of the step (plateau: and of the evaluations)."""

    name: str = setting(
        "cosine",
        "course after the warm-up; one_cycle: the cosine, after a warm-up along another one",
        choices=("constant", "step", "cosine", "poly", "one_cycle", "plateau"),
    )
    warmup_epochs: float = setting(
        0.0,
        "epochs of linear increase from 0 to lr; one_cycle: along a cosine, from lr / 25",
        minimum=0,
    )
    milestones: Tuple[float, ...] = setting((), "step: epochs at which lr is multiplied by gamma")
    gamma: float = setting(0.1, "step, plateau: the factor", above=0)
    final_lr: float = setting(
        0.0, "cosine, poly, one_cycle, plateau: final or lowest value, as a share of lr", minimum=0
    )
    patience: Optional[int] = setting(
        None,
        "plateau: evaluations in a row without a higher accuracy after which lr is multiplied by "
        "gamma, and again after as many more",
        minimum=1,
    )
    power: float = setting(1.0, "poly: lr falls as (1 - progress) to this power", above=0)


@dataclass(frozen=True)
class Train(Checked, section="train."):
    """Length, batch size and precision of training."""

    epochs: int = setting(10, "passes over the training set", minimum=1)
    global_batch_size: int = setting(128, "samples per step, over all ranks", minimum=1)
    max_steps: Optional[int] = setting(
        None,
        "number of steps after which the run stops (the schedule keeps its full length)",
        minimum=1,
    )
    patience: Optional[int] = setting(
        None,
        "early stopping: number of evaluations in a row without a higher accuracy "
        "(the schedule keeps its full length); null: never",
        minimum=1,
    )
    label_smoothing: float = setting(
        0.0, "share of a label spread over all classes", minimum=0, below=1
    )
    watchdog_seconds: float = setting(
        600.0,
        "time without progress after which a rank prints its stacks and ends the job",
        above=0,
    )
    precision: str = setting(
        "float32",
        "precision of the products in convolutions and dense layers in training; bfloat16 pays off "
        "on CPUs with AVX512_BF16 and large images, float16 is for GPUs, with a dynamic loss "
        "scale. Weights, sums and evaluation stay float32",
        choices=("float32", "bfloat16", "float16"),
    )
    max_minutes: Optional[float] = setting(
        None,
        "minutes after which the run saves and ends, as on a signal; the same command resumes it",
        above=0,
    )
    ema: Optional[float] = setting(
        None,
        "decay of a moving average of the weights, e.g. 0.999, which is what is evaluated, saved "
        "and exported; null: the weights themselves",
        above=0,
        below=1,
    )


@dataclass(frozen=True)
class Evaluate(Checked, section="evaluate."):
    """When and how the validation or test set is evaluated."""

    every_epochs: int = setting(1, "epochs between evaluations; 0: only at the end", minimum=0)
    batch_size: int = setting(250, "samples per batch and rank in evaluations", minimum=1)
    flip: bool = setting(
        False, "mean of the scores of each image and its mirror image (in evaluations only)"
    )
    top_k: Optional[int] = setting(
        None,
        "k of a further metric: share of samples whose class is among the k highest scores; null: "
        "none",
        minimum=2,
    )


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
    loggers: Tuple[str, ...] = setting(
        ("tensorboard",),
        "places where rank 0 writes points, e.g. [tensorboard, csv]: event files, metrics.csv, or "
        "Weights & Biases and MLflow if they are installed; []: nowhere",
        choices=("tensorboard", "csv", "wandb", "mlflow"),
    )
    histograms_every_epochs: int = setting(
        1, "epochs between histograms of weights and gradients in TensorBoard; 0: none", minimum=0
    )
    log_format: str = setting(
        "text",
        "format of what rank 0 prints: text, or one JSON object per line",
        choices=("text", "json"),
    )


@dataclass(frozen=True)
class Config(Checked):
    """A run."""

    seed: int = setting(
        0, "seed of weights, sample order, augmentation and dropout", minimum=0, below=2**31
    )
    output: str = setting("runs", "folder of all runs (~ and ${VARIABLE} are expanded)", path=True)
    name: str = setting("default", "name of the run, and of its folder in output")
    device: str = setting(
        "auto",
        "device of a rank; auto: the GPU numbered as the local rank, else the CPU",
        choices=("auto", "cpu", "gpu"),
    )
    batch_norm: str = setting(
        "local",
        "samples that are normalized together: of all ranks (sync), per node (group), or per rank "
        "(local)",
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

    @property
    def patient(self) -> Dict[str, Optional[int]]:
        """The settings that count evaluations without a higher accuracy."""
        return {"train.patience": self.train.patience, "schedule.patience": self.schedule.patience}

    def __post_init__(self) -> None:
        super().__post_init__()
        together.check(self)


# Settings that do not influence the result, and so may change when a run is resumed.
_FREE_TO_CHANGE = re.compile(
    r"(output|name|device|evaluate\..*|checkpoint\..*|monitor\..*"
    r"|data\.(folder|class_names|bad_samples|workers|prefetch)"
    r"|train\.(max_steps|max_minutes|patience|watchdog_seconds)"
    r"|optimizer\.(fp16_allreduce|shared_memory|bucket_mb)|model\.hybridize)"
)


def decides_result(name: str) -> bool:
    """Whether the setting of that dotted name influences the result of a run."""
    return not _FREE_TO_CHANGE.fullmatch(name) and name not in REMOVED

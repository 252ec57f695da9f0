"""What rank 0 tells of a run, in the terminal and to TensorBoard; other ranks' calls are empty."""

from __future__ import annotations

from pathlib import Path
from typing import List, Optional, Sequence

import mxnet as mx
import numpy as np

from . import dist, fashion_mnist, summary
from .config import Config
from .metrics import Evaluation, Means
from .monitor import Monitor
from .progress import ProgressDisplay


class Report:
    """The words and pictures of a run.

    Args:
        epoch_steps: steps of an epoch.
        first_step, last_step: where this process begins, and where the run ends.
        num_classes: of which the data's first few have names.
    """

    def __init__(
        self, config: Config, epoch_steps: int, first_step: int, last_step: int, num_classes: int
    ):
        self._config = config
        self._epoch_steps, self._last_step = epoch_steps, last_step
        known = () if config.data.dataset == "idx" else fashion_mnist.CLASS_NAMES
        self._names: List[str] = [*known, *map(str, range(len(known), num_classes))]
        self._monitor = Monitor(
            config.folder / "events",
            first_step,
            # A run that was complete before has told everything.
            dist.is_root() and config.monitor.tensorboard and first_step < last_step,
        )
        self._progress = ProgressDisplay(first_step, last_step) if dist.is_root() else None

    def begin(
        self,
        training_size: int,
        test_size: int,
        ctx: mx.Context,
        path: Optional[Path],
        layers: Sequence[summary.Row],
    ) -> None:
        """What is trained on what, and the checkpoint it goes on from."""
        config, ranks = self._config, dist.world_size()
        share = config.train.global_batch_size / ranks
        self._monitor.start(config, summary.as_markdown(layers))
        self.say(
            f"{config.folder}: {training_size} training and {test_size} test images, "
            f"{config.train.epochs} epochs of {self._epoch_steps} steps\n"
            f"{ranks} rank{'s' if ranks > 1 else ''} on {ctx.device_type}, global batch "
            f"{config.train.global_batch_size}, {share:g} a rank, batch norm {config.batch_norm}; "
            f"MXNet {mx.__version__}" + (f"\ngoes on from {path}" if path else "")
        )

    def step(self, step: int) -> None:
        """``step`` steps are done."""
        if self._progress:
            self._progress.step(step)

    def training(
        self,
        step: int,
        means: Means,
        lr: float,
        norm: Optional[mx.nd.NDArray],
        speed: Optional[float],
    ) -> None:
        """The figures since the last ones; ``speed`` in images a second."""
        scalars = {
            "loss": means.loss,
            "accuracy": means.accuracy,
            "lr": lr,
            "gradient_norm": float(norm.asscalar()) if norm is not None else None,
        }
        self._monitor.scalars("train", scalars, step)
        self._monitor.scalars("speed", {"images_per_second": speed}, step)
        if self._progress:
            epoch = -(-step // self._epoch_steps)
            self._progress.figures(
                step,
                f"epoch {epoch}/{self._config.train.epochs}  loss {means.loss:.4f}  "
                f"accuracy {means.accuracy:.4f}" + (f"  {speed:.0f} images/s" if speed else ""),
            )

    def epoch(self, step: int, means: Means) -> None:
        """The means of the epoch that ends after ``step`` steps."""
        self._monitor.scalars("epoch", {"loss": means.loss, "accuracy": means.accuracy}, step)
        epoch = -(-step // self._epoch_steps)
        self.say(f"epoch {epoch}: training loss {means.loss:.4f}  accuracy {means.accuracy:.4f}")

    def evaluation(self, step: int, seen: Evaluation) -> None:
        """The test set after ``step`` steps."""
        self._monitor.evaluation(seen, self._names, step)
        self.say(
            f"test loss {seen.loss:.4f}  accuracy {seen.accuracy:.4f}  ({seen.samples} images)"
        )

    def predictions(
        self, step: int, images: np.ndarray, labels: np.ndarray, predicted: np.ndarray
    ) -> None:
        """Some test images, uint8 (N, H, W), with what they are and what they were taken for."""
        self._monitor.predictions(images, labels, predicted, self._names, step)

    def end(self, step: int, seen: Optional[Evaluation], speed: Optional[float]) -> None:
        """How the run ended; without an evaluation it was stopped."""
        if seen is None:
            self.say(f"stopped at step {step} of {self._last_step}, as asked; saved")
        else:
            self._monitor.hyper_parameters(self._config, seen.scalars())
            shown = f", {speed:.0f} images/s" if speed else ""
            where = self._config.folder
            self.say(f"done: test accuracy {seen.accuracy:.4f}{shown}; all is in {where}")
        self._monitor.close()

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._progress:
            self._progress.line(text)

    def flush(self) -> None:
        """Have the event files hold every point given so far."""
        self._monitor.flush()

    def close(self) -> None:
        """Leave the terminal as it was and the event files complete."""
        if self._progress:
            self._progress.close()
        self._monitor.flush()

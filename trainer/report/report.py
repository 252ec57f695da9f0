"""What rank 0, and no other, reports of a run: in the terminal, TensorBoard and ``result.json``."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

import mxnet as mx
from mxnet import gluon

from .. import checkpoint, dist
from ..checkpoint import run_folder
from ..config import Config
from ..errors import describe_error
from ..model import graph, summary
from ..mxnet_internals import structural_parameters
from ..step import gradients
from ..step.evaluation import Evaluation
from ..step.metrics import Means
from . import result, wording
from .commands import next_commands
from .figures import Predicted
from .loggers import EVENTS, Loggers
from .progress import Display
from .system import System


class Report:
    """Reports one run.

    Args:
        epoch_steps: steps per epoch.
        first_step, last_step: where this process begins, and where the run ends unless it stops
            early.
        class_names: one for each score of the net.
        complete: the run is complete already, and has reported everything but what comes after
            the last save: a look at the test set, and its end.
    """

    def __init__(
        self,
        config: Config,
        epoch_steps: int,
        first_step: int,
        last_step: int,
        class_names: Sequence[str],
        complete: bool = False,
    ):
        self._config = config
        self._epoch_steps, self._first_step, self._last_step = epoch_steps, first_step, last_step
        self._began, self._started = time.monotonic(), result.now()
        self._names, self._complete = class_names, complete
        self._evaluated = ""  # the set that chooses: validation or test
        told = complete and result.tells_the_end(config.folder)
        writes = bool(config.monitor.loggers) and dist.is_root() and not told
        self._loggers = Loggers(config, first_step, self.warning, writes)
        self._system = System() if writes else None
        self._display: Optional[Display] = None
        if dist.is_root():
            ranks = dist.world_size()
            self._display = Display(config.monitor.log_format, first_step, last_step, ranks=ranks)

    def begin(
        self,
        sizes: Mapping[str, int],
        ctx: mx.Context,
        path: Optional[Path],
        layers: Sequence[summary.Row],
        net: gluon.Block,
    ) -> None:
        """Report images by set, the device and ``path``, the checkpoint to resume from, if any."""
        config = self._config
        if self._system:
            compiled = config.model.hybridize and isinstance(net, gluon.HybridBlock)
            drawn = self._graph(net) if compiled and not self._first_step else None  # once
            self._loggers.each("start", config, summary.as_markdown(layers), drawn)
        if dist.is_root() and not self._complete:
            self._write_result("unfinished", self._first_step)
        self._tell(
            "begin",
            folder=str(config.folder),
            training_samples=sizes["training"],
            validation_samples=sizes.get("validation"),
            test_samples=sizes.get("test"),
            epochs=config.train.epochs,
            steps_per_epoch=self._epoch_steps,
            first_step=self._first_step,
            last_step=self._last_step,
            ranks=dist.world_size(),
            device=ctx.device_type,
            global_batch_size=config.train.global_batch_size,
            batch_norm=config.batch_norm,
            ema=config.train.ema,
            mxnet=mx.__version__,
            resumed_from=str(path) if path else None,
        )

    def _graph(self, net: gluon.HybridBlock) -> Any:
        try:
            return graph.graph_def(net)
        # A user-defined forward may run on arrays only, and fail in any way on symbols.
        except Exception as error:
            self.warning(f"no graph of the net in TensorBoard: {describe_error(error)}")
            return None

    def step(self, step: int) -> None:
        """``step`` steps are done."""
        if self._display:
            self._display.step(step)

    def first_step(self, step: int, means: Means) -> None:
        """Show the first step that this process has made, for which everything is compiled."""
        self._tell_step(step, means, images_per_second=None)

    def training(
        self,
        step: int,
        means: Means,
        lr: float,
        norm: Optional[mx.nd.NDArray],
        speed: Optional[float],
        times: Mapping[str, float],
    ) -> None:
        """Report the metrics since the last call, the L2 ``norm`` of the last step's gradient,
        images per second, and ``times``: of ``step.timing.Timing.read``, with float16's loss scale.
        """
        scalars = {
            "loss/train": means.loss,
            "accuracy/train": means.accuracy,
            "optimizer/lr": lr,
            "optimizer/gradient_norm": float(norm.asscalar()) if norm is not None else None,
            "speed/images_per_second": speed,
            **times,
        }
        if self._system:
            scalars.update({f"system/{name}": v for name, v in self._system.read().items()})
        self._loggers.scalars(scalars, step)
        scale = {name: times.get(f"optimizer/{name}") for name in ("loss_scale", "skipped_steps")}
        self._tell_step(step, means, lr=lr, **scale, images_per_second=speed)

    def epoch(self, step: int, means: Means, skipped: int) -> None:
        """Report the means of the epoch that ends after ``step`` steps, and the number of training
        samples that any rank has found bad so far and ``skipped``."""
        figures = means._asdict()
        self._loggers.scalars({f"{name}/epoch": v for name, v in figures.items()}, step)
        self._tell("epoch", step=step, epoch=self._epoch(step), **figures, skipped_samples=skipped)

    def parameters(self, step: int, net: gluon.Block, trainer: gluon.Trainer) -> None:
        """Write histograms of the weights and of the last step's gradients, where they are due."""
        every = self._config.monitor.histograms_every_epochs
        due = every and (self._epoch(step) % every == 0 or step == self._last_step)
        if self._system and due:
            mx.nd.waitall()  # oneDNN reorders weights in place during a forward
            # Gluon's own names count the layers that the process has made before.
            named = structural_parameters(net)
            known = {p.name: name for name, p in named.items() if p.grad_req != "null"}
            weights = {name: named[name].data().asnumpy() for name in known.values()}
            found = gradients.mean_gradients(trainer)
            moves = {known[own]: gradient for own, gradient in found.items() if own in known}
            self._loggers.each("histograms", "weights", weights, step)
            self._loggers.each("histograms", "weight_gradients", moves, step)

    def evaluation(
        self, step: int, seen: Evaluation, name: str, shown: Optional[Predicted]
    ) -> None:
        """Report an evaluation on the ``validation`` or ``test`` set after ``step`` steps, with its
        first images to be ``shown``, or None if it has none that can be read."""
        # Of a complete run all but a look at the test set was logged before it was saved.
        if self._evaluated or not self._complete:
            self._loggers.each("evaluation", seen, shown, self._names, step, name)
            self._loggers.scalars({f"{k}/{name}": v for k, v in seen.scalars().items()}, step)
        self._evaluated = self._evaluated or name
        self._tell("evaluation", step=step, set=name, samples=seen.samples, **seen.scalars())
        if wording.finite(seen._asdict())["loss"] is None:
            self.warning(f"the {name} loss is not finite: the accuracy says nothing either")

    def drift(self, step: int, figures: Mapping[str, float]) -> None:
        """Report how far the ranks' running statistics have drifted apart (see replica.drift)."""
        self._loggers.scalars({f"ranks/{name}": v for name, v in figures.items()}, step)

    def checkpoint(self, path: Path) -> None:
        """Report that a checkpoint was written."""
        self._tell("checkpoint", step=checkpoint.step_of(path), path=str(path))

    def warning(self, message: str) -> None:
        """Report something that went wrong without ending the run."""
        self._tell("warning", message=message)

    def end(
        self,
        step: int,
        state: str,
        seen: Optional[Evaluation],
        speed: Optional[float],
        test: Optional[Evaluation] = None,
    ) -> None:
        """Report how the run ended, with ``state`` as in :class:`trainer.report.result.Run`.

        ``seen`` is the last evaluation, None where the run was stopped or has nothing to evaluate;
        ``speed`` images per second over the whole run; ``test`` comes with a validation set.
        """
        if not dist.is_root():
            return
        self.flush(step)
        config = self._config
        saved = checkpoint.listing(config.checkpoint_folder)
        best = checkpoint.find_best(config.checkpoint_folder)
        figures: Dict[str, Any] = {
            "accuracy": seen and seen.accuracy,
            "loss": seen and seen.loss,
            "test_accuracy": test and test.accuracy,
            "best_accuracy": checkpoint.read_state(best).accuracy if best else None,
            "images_per_second": speed,
            "seconds": round(time.monotonic() - self._began, 3),
        }
        if not self._complete or not result.tells_the_end(config.folder):
            self._write_result(state, step, **figures)
            if state != "stopped":
                self._loggers.each("hyper_parameters", config, dist.world_size())
        self._tell(
            "end",
            state=state,
            step=step,
            last_step=self._last_step,
            **figures,
            set=self._evaluated or None,
            checkpoint=str(saved[-1]) if saved else None,
            best_checkpoint=str(best) if best else None,
            events=str(config.folder / EVENTS) if "tensorboard" in config.monitor.loggers else None,
            next=next_commands(config, state),
        )

    def end_display(self) -> None:
        """Leave the live bar; lines may still be printed. Calling it again is harmless."""
        if self._display:
            self._display.close()

    def close(self, failure: Optional[type] = None, *_: object) -> None:
        """Leave the live bar, close the loggers and stop watching the machine; as ``__exit__``, it
        gets the type of an exception that ends the run."""
        self.end_display()
        if self._system:
            self._system.close()
        self._loggers.close(failed=failure is not None)

    def flush(self, step: int) -> None:
        """Write all pending points to the event files, and what of the run's folder has gone."""
        with contextlib.suppress(OSError):  # the save that follows, or precedes, says why
            if dist.is_root() and run_folder.remade(self._config):
                self.warning(
                    f"{self._config.folder} was removed or renamed in mid-run; it is there again "
                    "with its config and points, without what was saved before"
                )
                self._write_result("unfinished", step)
        self._loggers.each("flush")

    def _epoch(self, step: int) -> int:
        return -(-step // self._epoch_steps)

    def _tell(self, event: str, **figures: Any) -> None:
        if self._display:
            self._display.show(event, figures)

    def _tell_step(self, step: int, means: Means, **more: Any) -> None:
        place = {"epoch": self._epoch(step), "epochs": self._config.train.epochs}
        self._tell("step", step=step, **place, **means._asdict(), **more)

    def _write_result(self, state: str, step: int, **figures: Any) -> None:
        try:
            result.write_result(
                self._config.folder,
                state=state,
                started=self._started,
                step=step,
                last_step=self._last_step,
                epochs=self._config.train.epochs,
                ranks=dist.world_size(),
                **figures,
            )
        except OSError as error:  # a full disk: the run itself can continue
            self.warning(f"{self._config.folder / result.RESULT} cannot be written: {error}")

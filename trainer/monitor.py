"""What TensorBoard shows of a run: written by rank 0 alone, on the others every call is empty.

Tags: ``train/*`` means over the steps since the last point, ``epoch/*`` over an epoch's training
samples, ``test/*`` and ``class/*`` over the test set, ``speed/*`` and ``batch_norm/*`` of the whole
job, ``system/*`` of rank 0's machine. docs/monitoring.md shows what TensorBoard makes of them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

import numpy as np

from . import precision_recall
from .config import Config, as_yaml, decides_result, to_dict
from .figures import confusion_figure, prediction_figure
from .metrics import Evaluation
from .settings import flat

SHOWN_CLASSES = 20  # with more of them, no curve for each
HISTOGRAM_VALUES = 65536  # of an array go into its histogram, at most
HISTOGRAM_BINS = 64

_LAYOUT = {
    "training and test": {
        "loss": ["Multiline", ["train/loss", "epoch/loss", "test/loss"]],
        "accuracy": ["Multiline", ["train/accuracy", "epoch/accuracy", "test/accuracy"]],
        "accuracy of each class": ["Multiline", ["class/.*"]],
    },
    "ranks": {
        "compute, ms a step": ["Multiline", ["speed/compute_ms_.*"]],
        "communication, ms a step": ["Multiline", ["speed/(allreduce|waiting|batch_norm_sums)_ms"]],
        "batch norm drift": ["Multiline", ["batch_norm/.*"]],
    },
}


class Monitor:
    """Event files in ``folder``.

    Args:
        first_step: where the run goes on. Points from there on that an earlier, killed process
            wrote are taken back, so that a resumed curve has each step once.
        enabled: whether this process writes.
    """

    def __init__(self, folder: Path, first_step: int, enabled: bool):
        self._writer: Any = None
        if enabled:
            from tensorboardX import SummaryWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog

            from . import event_file

            self._writer = SummaryWriter(event_file.address(folder), filename_suffix=_suffix())
            # tensorboardX hands events to a thread that its flush() does not wait for: a killed
            # run would lose points that its last checkpoint has seen. They are written here.
            events = self._writer.file_writer.event_writer
            events.add_event = events._ev_writer.write_event
            if first_step:
                # A point at step n is written after n steps; the checkpoint of step n has seen it.
                start = Event(session_log=SessionLog(status=SessionLog.START))
                self._writer.file_writer.add_event(start, first_step + 1)

    def start(self, config: Config, layers: str, graph: Any = None) -> None:
        """The resolved config and the net's layers, as text; its graph, where it has one.

        Args:
            graph: a GraphDef, see :func:`trainer.graph.graph_def`.
        """
        if self._writer:
            from tensorboardX.proto.event_pb2 import Event

            self._writer.add_custom_scalars(_LAYOUT)
            if graph is not None:
                event = Event(graph_def=graph.SerializeToString())
                self._writer.file_writer.add_event(event)
            self._writer.add_text("config", "    " + as_yaml(config).replace("\n", "\n    "), 0)
            self._writer.add_text("model", layers, 0)

    def scalars(self, values: Mapping[str, Optional[float]], step: int) -> None:
        """Points after ``step`` steps, by tag; None is left out."""
        if self._writer:
            for tag, value in values.items():
                if value is not None:
                    self._writer.add_scalar(tag, value, step)
            self._writer.flush()

    def evaluation(self, evaluation: Evaluation, names: Sequence[str], step: int) -> None:
        """The test set's figures, those of each class, and the confusion matrix as a picture."""
        if not self._writer:
            return
        if len(names) <= SHOWN_CLASSES:
            shares = zip(names, evaluation.class_accuracy)
            seen = {f"class/{name}": share for name, share in shares if not np.isnan(share)}
            self.scalars(seen, step)
            self._curves(evaluation.score_counts, names, step)
        self._writer.add_figure(
            "test/confusion", confusion_figure(evaluation.confusion, names), step
        )
        self.scalars({f"test/{name}": v for name, v in evaluation.scalars().items()}, step)

    def _curves(self, counts: Optional[np.ndarray], names: Sequence[str], step: int) -> None:
        if counts is not None:
            for label, name in enumerate(names):
                curve = precision_recall.curve(counts, label)
                self._writer.add_pr_curve_raw(f"test/{name}", *curve, step)

    def histograms(self, group: str, arrays: Mapping[str, np.ndarray], step: int) -> None:
        """How the values of arrays are spread, ``group/name``: of large ones every n-th value."""
        if self._writer:
            for name, array in arrays.items():
                values = array.ravel()[:: -(-array.size // HISTOGRAM_VALUES)]
                values = values[np.isfinite(values)].astype(np.float64)
                if values.size:
                    self._writer.add_histogram(f"{group}/{name}", values, step, HISTOGRAM_BINS)

    def predictions(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        predicted: np.ndarray,
        names: Sequence[str],
        step: int,
    ) -> None:
        """Images, uint8 (N, H, W[, C]), with true and predicted names, wrong ones in red."""
        if self._writer:
            figure = prediction_figure(images, labels, predicted, names)
            self._writer.add_figure("test/predictions", figure, step)

    def hyper_parameters(
        self, config: Config, ranks: int, metrics: Mapping[str, Optional[float]]
    ) -> None:
        """What decides the result, and the final figures, for the HPARAMS tab; None is left out."""
        if not self._writer:
            return
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        settings = {k: v for k, v in flat(to_dict(config)).items() if decides_result(k)}
        figures = {f"final/{name}": value for name, value in metrics.items() if value is not None}
        # Without the description of an experiment, which comes first, TensorBoard makes one of all
        # runs, and shows the settings in which they differ before the others.
        _, *session = hparams(_as_parameters({**settings, "ranks": ranks}), figures)
        folder = f"{self._writer.file_writer.get_logdir()}/hparams"
        with SummaryWriter(folder, filename_suffix=_suffix()) as writer:
            for summary in session:
                writer.file_writer.add_summary(summary)
            for tag, value in figures.items():
                writer.add_scalar(tag, value)

    def flush(self) -> None:
        """Have the files hold every point given so far."""
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        """Write what is left and end the files."""
        if self._writer:
            self._writer.close()


def _suffix() -> str:
    """Of a file's name, which has seconds only: a second writer must not meet the first's file."""
    return f".{time.time_ns()}"


def _as_parameters(settings: Mapping[str, Any]) -> Dict[str, Any]:
    """What is no number, text or flag becomes text, as HPARAMS knows no other."""
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in settings.items()
    }

"""Writes a run's TensorBoard events, on rank 0; on the others every call is a no-op.

Tags: ``train/*`` are means over the steps since the last point, ``epoch/*`` over an epoch's
training samples, ``test/*`` and ``class/*`` over the test set; ``speed/*`` and ``batch_norm/*``
concern the whole job, ``system/*`` rank 0's machine. docs/monitoring.md shows them in TensorBoard.
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

import numpy as np

from ..config import Config, as_yaml, decides_result, to_dict
from ..config.settings import flat
from ..step.evaluation import Evaluation, curve
from .figures import confusion_figure, prediction_figure

SHOWN_CLASSES = 20  # with more classes, there are no curves for each
HISTOGRAM_VALUES = 65536  # the most elements of an array in its histogram
HISTOGRAM_BINS = 64

_LAYOUT = {
    "training and test": {
        "loss": ["Multiline", ["train/loss", "epoch/loss", "validation/loss", "test/loss"]],
        "accuracy": [
            "Multiline",
            ["train/accuracy", "epoch/accuracy", "validation/accuracy", "test/accuracy"],
        ],
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
        first_step: where the run resumes. TensorBoard then drops later points of an earlier, killed
            process, so that the curve has each step once.
        enabled: whether this process writes.
    """

    def __init__(self, folder: Path, first_step: int, enabled: bool):
        self._folder = folder
        self._file: Any = None
        if enabled:  # other ranks need not import it
            from tensorboardX import summary
            from tensorboardX.proto.event_pb2 import Event, SessionLog

            from .event_file import EventFile

            self._make, self._file = summary, EventFile(folder)
            if first_step:
                # The point at step n was written before the checkpoint of step n.
                start = Event(session_log=SessionLog(status=SessionLog.START))
                self._file.event(start, first_step + 1)

    def start(self, config: Config, layers: str, graph: Any = None) -> None:
        """Write the resolved config and the net's layers as text, and its graph if given.

        Args:
            graph: a GraphDef, see :func:`trainer.model.graph.graph_def`.
        """
        if self._file:
            from tensorboardX.proto.event_pb2 import Event

            self._file.summary(self._make.custom_scalars(_LAYOUT))
            if graph is not None:
                self._file.event(Event(graph_def=graph.SerializeToString()))
            text = "    " + as_yaml(config).replace("\n", "\n    ")
            self._file.summary(self._make.text("config", text), 0)
            self._file.summary(self._make.text("model", layers), 0)

    def scalars(self, values: Mapping[str, Optional[float]], step: int) -> None:
        """Write points after ``step`` steps, by tag; None is skipped."""
        if self._file:
            for tag, value in values.items():
                if value is not None:
                    self._file.summary(self._make.scalar(tag, value), step)
            self._file.flush()

    def evaluation(
        self, evaluation: Evaluation, names: Sequence[str], step: int, group: str = "test"
    ) -> None:
        """Write the metrics on the ``test`` or ``validation`` set, in total and by class, and the
        confusion matrix.
        """
        if not self._file:
            return
        if len(names) <= SHOWN_CLASSES:
            shares = zip(names, evaluation.class_accuracy)
            seen = {f"class/{name}": share for name, share in shares if not np.isnan(share)}
            self.scalars(seen, step)
            self._curves(evaluation.score_counts, names, step, group)
        self._picture(f"{group}/confusion", confusion_figure(evaluation.confusion, names), step)
        self.scalars({f"{group}/{name}": v for name, v in evaluation.scalars().items()}, step)

    def _curves(
        self, counts: Optional[np.ndarray], names: Sequence[str], step: int, group: str
    ) -> None:
        if counts is not None:
            for label, name in enumerate(names):
                figures = curve(counts, label)
                self._file.summary(self._make.pr_curve_raw(f"{group}/{name}", *figures), step)

    def _picture(self, tag: str, figure: Any, step: int) -> None:
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[:, :, :3]
        self._file.summary(self._make.image(tag, pixels, dataformats="HWC"), step)

    def histograms(self, group: str, arrays: Mapping[str, np.ndarray], step: int) -> None:
        """Write histograms of arrays as ``group/name``; large arrays are subsampled."""
        if self._file:
            for name, array in arrays.items():
                values = array.ravel()[:: -(-array.size // HISTOGRAM_VALUES)]
                values = values[np.isfinite(values)].astype(np.float64)
                if values.size:
                    made = self._make.histogram(f"{group}/{name}", values, HISTOGRAM_BINS)
                    self._file.summary(made, step)

    def predictions(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        predicted: np.ndarray,
        names: Sequence[str],
        step: int,
        group: str = "test",
    ) -> None:
        """Write images, uint8 (N, H, W[, C]), with true and predicted names, errors in red."""
        if self._file:
            figure = prediction_figure(images, labels, predicted, names)
            self._picture(f"{group}/predictions", figure, step)

    def hyper_parameters(
        self, config: Config, ranks: int, metrics: Mapping[str, Optional[float]]
    ) -> None:
        """Write hyperparameters and final metrics for the HPARAMS tab; None is skipped."""
        if not self._file:
            return
        from .event_file import EventFile

        settings = {k: v for k, v in flat(to_dict(config)).items() if decides_result(k)}
        figures = {f"final/{name}": value for name, value in metrics.items() if value is not None}
        # The first summary describes an experiment. Without it TensorBoard infers one from all
        # runs, and lists the settings in which they differ first.
        _, *session = self._make.hparams(_as_parameters({**settings, "ranks": ranks}), figures)
        with contextlib.closing(EventFile(self._folder / "hparams")) as file:
            for summary in (*session, *itertools.starmap(self._make.scalar, figures.items())):
                file.summary(summary)

    def flush(self) -> None:
        """Write all pending points to the files."""
        if self._file:
            self._file.flush()

    def close(self) -> None:
        """Write all pending points and close the files."""
        if self._file:
            self._file.close()


def _as_parameters(settings: Mapping[str, Any]) -> Dict[str, Any]:
    """Values that HPARAMS does not support, as text: only numbers, strings and booleans are."""
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in settings.items()
    }

"""Writes a run's TensorBoard events, on rank 0 alone.

TensorBoard sorts groups by name: ``accuracy/*`` and ``loss/*`` come first. In them ``train`` is a
mean over the steps since the last point, ``epoch`` over an epoch's training samples, ``test`` and
``validation`` over these sets; ``speed/*`` and ``ranks/*`` concern the whole job, ``system/*`` rank
0's machine. docs/monitoring.md shows them in TensorBoard.
"""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import numpy as np
from tensorboardX import summary as make
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from ..config import Config, as_yaml
from ..step.evaluation import Evaluation, curve
from .figures import Predicted, confusion_figure, prediction_figure
from .loggers import AppendedFile, settings_of

SHOWN_CLASSES = 20  # with more classes, there are no curves for each
CONFUSION_CLASSES = 1000  # more than its figure has pixels; with more there is none
HISTOGRAM_VALUES = 65536  # the most elements of an array in its histogram
HISTOGRAM_BINS = 64

_LAYOUT = {
    "training and test": {
        "loss": ["Multiline", ["loss/.*"]],
        "accuracy": ["Multiline", ["accuracy/.*"]],
        "accuracy of each class": ["Multiline", ["per_class/.*"]],
    },
    "ranks": {
        "compute, ms per step": ["Multiline", ["speed/compute_ms_.*"]],
        "communication, ms per step": [
            "Multiline",
            ["speed/(allreduce|waiting|batch_norm_sums)_ms"],
        ],
        "batch norm drift": ["Multiline", ["ranks/drift.*"]],
    },
}


class EventFile(AppendedFile):
    """A new file in ``folder``.

    tensorboardX makes the summaries, but its SummaryWriter does not write them: it raises on a full
    disk, in the middle of a record; it passes events to a thread that its flush does not wait for;
    and its queue needs /dev/shm. A file is a sequence of records: the length of an event, the
    event, and a checksum after each. This one also survives a kill right after a flush.
    """

    def __init__(self, folder: Path):
        # TensorBoard reads a folder's files in the order of their names; a clock may go back.
        names = [path.name.split(".") for path in folder.glob("events.out.tfevents.*")]
        earlier = [int(name[3]) for name in names if name[3].isdigit()]
        now = max([time.time_ns() // 10**9, *(number + 1 for number in earlier)])
        super().__init__(folder / f"events.out.tfevents.{now:010d}.{socket.gethostname()}")
        self.event(Event(file_version="brain.Event:2"))

    def summary(self, summary: Any, step: Optional[int] = None) -> None:
        """Add a ``Summary``, which holds a point; as :meth:`event` does."""
        self.event(Event(summary=summary), step)

    def event(self, event: Event, step: Optional[int] = None) -> None:
        """Add ``event``, whose time is now; in memory until :meth:`flush`."""
        event.wall_time = time.time()
        if step is not None:
            event.step = int(step)
        content = event.SerializeToString()
        for part in (struct.pack("<Q", len(content)), content):
            self.append(part + struct.pack("<I", masked_crc32c(part)))


class Monitor(EventFile):
    """What a run writes into its event file in ``folder``.

    Where it resumes, at ``first_step``, TensorBoard drops later points of an earlier, killed
    process, so that the curve has each step once.
    """

    def __init__(self, folder: Path, first_step: int):
        super().__init__(folder)
        if first_step:
            # The point at step n was written before the checkpoint of step n.
            start = Event(session_log=SessionLog(status=SessionLog.START))
            self.event(start, first_step + 1)

    def start(self, config: Config, layers: str, graph: Any = None) -> None:
        """Write the resolved config and the net's layers as text, and its graph if given, a
        GraphDef as :func:`trainer.model.graph.graph_def` makes it."""
        self.summary(make.custom_scalars(_LAYOUT))
        if graph is not None:
            self.event(Event(graph_def=graph.SerializeToString()))
        text = "    " + as_yaml(config).replace("\n", "\n    ")
        self.summary(make.text("config", text), 0)
        self.summary(make.text("model", layers), 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write points after ``step`` steps, by tag."""
        for tag, value in values.items():  # make.scalar takes + and - for the same tag, _
            self.summary(Summary(value=[Summary.Value(tag=tag, simple_value=float(value))]), step)
        self.flush()

    def evaluation(
        self,
        evaluation: Evaluation,
        shown: Optional[Predicted],
        names: Sequence[str],
        step: int,
        group: str,
    ) -> None:
        """Write what there is of each class of the ``test`` or ``validation`` set, the confusion
        matrix, and the images that are ``shown``, if any, with their true and predicted names.
        """
        if len(names) <= SHOWN_CLASSES:
            shares = {f"per_class/{group}/{n}": s for n, s in zip(names, evaluation.class_accuracy)}
            self.scalars({tag: share for tag, share in shares.items() if not np.isnan(share)}, step)
            if evaluation.score_counts is not None:
                for label, name in enumerate(names):
                    figures = curve(evaluation.score_counts, label)
                    self.summary(make.pr_curve_raw(f"{group}/{name}", *figures), step)
        if len(names) <= CONFUSION_CLASSES:
            self._picture(f"{group}/confusion", confusion_figure(evaluation.confusion, names), step)
        if shown is not None:
            self._picture(f"{group}/predictions", prediction_figure(shown, names), step)

    def _picture(self, tag: str, figure: Any, step: int) -> None:
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[:, :, :3]
        self.summary(make.image(tag, pixels, dataformats="HWC"), step)

    def histograms(self, group: str, arrays: Mapping[str, np.ndarray], step: int) -> None:
        """Write histograms of arrays as ``group/name``; large arrays are subsampled."""
        for name, array in arrays.items():
            values = array.ravel()[:: -(-array.size // HISTOGRAM_VALUES)]
            values = values[np.isfinite(values)].astype(np.float64)
            if values.size:
                self.summary(make.histogram(f"{group}/{name}", values, HISTOGRAM_BINS), step)

    def hyper_parameters(self, config: Config, ranks: int) -> None:
        """Write the settings that decide the result, for the HPARAMS tab, which puts the last point
        of each curve beside them.
        """
        settings = {**settings_of(config), "ranks": ranks}.items()
        # HPARAMS supports numbers, strings and booleans alone.
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings}
        # The first summary describes an experiment. Without it TensorBoard infers one from all
        # runs, and lists the settings in which they differ first.
        _, *session = make.hparams(plain, {})
        for summary in session:
            self.summary(summary)

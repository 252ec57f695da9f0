"""What TensorBoard shows of a run: written by rank 0 alone, on the others every call is empty.

Tags: ``train/*`` means over the steps since the last point, ``epoch/*`` over an epoch's training
samples, ``test/*`` over the test set, ``speed/*`` of the whole job.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

import numpy as np

from .config import Config, as_yaml, to_dict
from .metrics import Evaluation


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

            # File names have seconds only; a second writer must not overwrite the first.
            suffix = f".{time.time_ns()}"
            self._writer = SummaryWriter(event_file.address(folder), filename_suffix=suffix)
            # tensorboardX hands events to a thread that its flush() does not wait for: a killed
            # run would lose points that its last checkpoint has seen. They are written here.
            events = self._writer.file_writer.event_writer
            events.add_event = events._ev_writer.write_event
            if first_step:
                # A point at step n is written after n steps; the checkpoint of step n has seen it.
                start = Event(session_log=SessionLog(status=SessionLog.START))
                self._writer.file_writer.add_event(start, first_step + 1)

    def start(self, config: Config, layers: str) -> None:
        """The resolved config and the net's layers, as text."""
        if self._writer:
            self._writer.add_text("config", "    " + as_yaml(config).replace("\n", "\n    "), 0)
            self._writer.add_text("model", layers, 0)

    def scalars(self, group: str, values: Mapping[str, Optional[float]], step: int) -> None:
        """Points ``group/name`` after ``step`` steps; None is left out."""
        if self._writer:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, step)
            self._writer.flush()

    def evaluation(self, evaluation: Evaluation, names: Sequence[str], step: int) -> None:
        """The test set's figures and the confusion matrix as a picture."""
        self.scalars("test", evaluation.scalars(), step)
        if self._writer:
            self._writer.add_figure(
                "test/confusion", confusion_figure(evaluation.confusion, names), step
            )

    def predictions(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        predicted: np.ndarray,
        names: Sequence[str],
        step: int,
    ) -> None:
        """A grid of images, uint8 (N, H, W), with true and predicted names, wrong ones in red."""
        if self._writer:
            figure = prediction_figure(images, labels, predicted, names)
            self._writer.add_figure("test/predictions", figure, step)

    def hyper_parameters(self, config: Config, metrics: Dict[str, float]) -> None:
        """The settings with the final figures, for the HPARAMS tab."""
        if self._writer:
            self._writer.add_hparams(
                _flat(to_dict(config)),
                {f"final/{name}": value for name, value in metrics.items()},
                name="hparams",
            )

    def flush(self) -> None:
        """Have the files hold every point given so far."""
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        """Write what is left and end the files."""
        if self._writer:
            self._writer.close()


def confusion_figure(confusion: np.ndarray, names: Sequence[str]) -> Any:
    """A Matplotlib figure of a confusion matrix, int (K, K), in percent of each true class."""
    figure, axes = _figure(8, 8)
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(names) <= 20:  # more numbers than that cannot be read
        for row, column in np.ndindex(*shares.shape):
            share = shares[row, column]
            colour = "white" if share > 50 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour)
    figure.tight_layout()
    return figure


def prediction_figure(
    images: np.ndarray, labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]
) -> Any:
    """A Matplotlib figure of images in rows of eight, each under its true and predicted name."""
    rows = -(-len(images) // 8)
    figure, _ = _figure(12, 1.9 * rows, axes=False)
    for place, (image, label, guess) in enumerate(zip(images, labels, predicted)):
        axes = figure.add_subplot(rows, 8, place + 1)
        axes.imshow(image, cmap="gray")
        axes.axis("off")
        right = label == guess
        title = names[label] if right else f"{names[label]}\nnot {names[guess]}"
        axes.set_title(title, fontsize=9, color="black" if right else "red")
    figure.tight_layout()
    return figure


def _figure(width: float, height: float, axes: bool = True) -> Any:
    # Without pyplot, which would ask for a screen. Imported late: it takes half a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=80)
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot() if axes else None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Dict[str, Any]:
    """Dotted names; what is no number, text or flag becomes text, as HPARAMS knows no other."""
    flat: Dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat

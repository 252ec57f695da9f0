"""Live curves of a run in a notebook cell while its ranks train.

    launch.run(train, ranks=2, on_line=LiveCurves())

The ranks must print JSON lines (``monitor.log_format: json``, docs/monitoring.md).
"""

from __future__ import annotations

import io
import json
import math
from typing import Any, Dict, List, Optional

from .console import print_line
from .report import wording

_FIGURES = ("loss", "accuracy")


class LiveCurves:
    """Redraws loss and accuracy at each report; prints all other output of the ranks."""

    def __init__(self) -> None:
        self._events: Dict[str, List[Dict[str, Any]]] = {"step": [], "evaluation": []}
        self._display: Any = None

    def __call__(self, line: str) -> None:
        """Handle one line of a rank's output, without its newline."""
        event = _event_in(line)
        if event is None:
            print_line(line, raw=True)
            return
        kind = event["event"]
        text = wording.text(kind, event)
        if kind in self._events:
            self._events[kind].append(event)
            self._draw(text)
        if kind != "step" and text:
            print_line(text)

    def _draw(self, title: str) -> None:
        from IPython import display

        picture = display.Image(self._picture(title), format="png", width=720)
        if self._display is None:
            self._display = display.display(picture, display_id=True)
        else:
            self._display.update(picture)

    def _picture(self, title: str) -> bytes:
        # Not pyplot, whose state belongs to the notebook.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3), dpi=120, layout="constrained")
        figure.suptitle(title, fontsize=10)
        for axes, name in zip(figure.subplots(1, 2), _FIGURES):
            for label, events in self._curves().items():
                points = [(event["step"], event[name]) for event in events]
                style = "-" if label == "training" else "o"
                axes.plot(*zip(*points) if points else ([], []), style, label=label)
            axes.set_xlabel("step")
            axes.set_ylabel(name)
            axes.grid(alpha=0.3)
            axes.legend()
        written = io.BytesIO()
        figure.savefig(written, format="png")
        return written.getvalue()

    def _curves(self) -> Dict[str, List[Dict[str, Any]]]:
        """Events by what they are of: training, and the sets that were evaluated."""
        curves = {"training": self._events["step"]}
        for event in self._events["evaluation"]:
            curves.setdefault(event.get("set") or "test", []).append(event)
        return curves


def _event_in(line: str) -> Optional[Dict[str, Any]]:
    """The event in a line, which may be prefixed with its rank; None for ordinary text."""
    try:
        event = json.loads(line[line.index("{") :])
    except ValueError:
        return None
    if not isinstance(event, dict) or event.get("event") not in wording.EVENTS:
        return None
    # Non-finite numbers are null in JSON.
    measured = {"step": _FIGURES, "evaluation": event}.get(event["event"], ())
    return {k: math.nan if v is None and k in measured else v for k, v in event.items()}

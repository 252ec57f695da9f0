"""A run's curves in a notebook's cell while its ranks train.

    launch.run(train, ranks=2, on_line=LiveCurves())

The ranks tell of the run in JSON lines (``monitor.log_format: json``, docs/monitoring.md).
"""

from __future__ import annotations

import io
import json
import math
from typing import Any, Dict, List, Optional

from . import wording

_FIGURES = ("loss", "accuracy")


class LiveCurves:
    """Draws loss and accuracy anew at each reading; all else that the ranks say is printed."""

    def __init__(self) -> None:
        self._told: Dict[str, List[Dict[str, Any]]] = {"step": [], "evaluation": []}
        self._display: Any = None

    def __call__(self, line: str) -> None:
        """Take one line of a rank, without its end."""
        told = _told_in(line)
        if told is None:
            print(line, flush=True)
            return
        text = wording.text(told["event"], told)
        if told["event"] in self._told:
            self._told[told["event"]].append(told)
            self._draw(text)
        if told["event"] != "step" and text:
            print(text, flush=True)

    def _draw(self, title: str) -> None:
        from IPython import display

        picture = display.Image(self._picture(title), format="png", width=720)
        if self._display is None:
            self._display = display.display(picture, display_id=True)
        else:
            self._display.update(picture)

    def _picture(self, title: str) -> bytes:
        # Without pyplot, whose settings and open figures are the notebook's own.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3), dpi=120, layout="constrained")
        figure.suptitle(title, fontsize=10)
        for axes, name in zip(figure.subplots(1, 2), _FIGURES):
            for event, style, label in (("step", "-", "training"), ("evaluation", "o", "test")):
                points = [(told["step"], told[name]) for told in self._told[event]]
                axes.plot(*zip(*points) if points else ([], []), style, label=label)
            axes.set_xlabel("step")
            axes.set_ylabel(name)
            axes.grid(alpha=0.3)
            axes.legend()
        written = io.BytesIO()
        figure.savefig(written, format="png")
        return written.getvalue()


def _told_in(line: str) -> Optional[Dict[str, Any]]:
    """The event in a line, which may begin with its rank; None where it is ordinary text."""
    try:
        told = json.loads(line[line.index("{") :])
    except ValueError:
        return None
    if not isinstance(told, dict) or told.get("event") not in wording.EVENTS:
        return None
    # JSON has null for what is not finite.
    return {**told, **{name: math.nan for name in _FIGURES if told.get(name, 0) is None}}

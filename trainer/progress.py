"""How far the run is, on rank 0's terminal: a live bar, or plain lines where there is none."""

from __future__ import annotations

import sys
import time
from typing import Optional, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .console import print_line

_BAR = 20  # characters of the bar in plain lines


class ProgressDisplay:
    """A bar over the steps of a run, with the last figures beside it.

    Logs and pipes (horovodrun prefixes every line with its rank) get a line at each reading.
    """

    def __init__(self, first_step: int, last_step: int, stream: Optional[TextIO] = None):
        self._stream = stream or sys.stdout
        self._first, self._last = first_step, last_step
        self._started = time.monotonic()
        self._figures = ""
        self._live: Optional[Progress] = None
        if self._stream.isatty():
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._task = self._live.add_task(
                "training", total=last_step, completed=first_step, figures=""
            )
            self._live.start()

    def step(self, step: int) -> None:
        """``step`` steps are done."""
        if self._live:
            self._live.update(self._task, completed=step)

    def figures(self, step: int, text: str) -> None:
        """Show the figures read after ``step`` steps."""
        if self._live:
            self._live.update(self._task, completed=step, figures=text)
            return
        done = step / self._last
        bar = "=" * round(_BAR * done)
        self._print(f"[{bar:{_BAR}}] {step}/{self._last} {text}{self._remaining(step)}")

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live:
            self._live.stop()

    def _remaining(self, step: int) -> str:
        made = step - self._first
        if made <= 0 or step >= self._last:
            return ""
        seconds = round((time.monotonic() - self._started) * (self._last - step) / made)
        return f"  {seconds // 60}:{seconds % 60:02} left"

    def _print(self, text: str) -> None:
        print_line(text, self._stream)

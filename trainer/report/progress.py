"""Progress on rank 0's stdout: a live bar, plain lines where it is no terminal, or JSON.

What is reported are events, a name with values; docs/monitoring.md lists them. JSON prints them as
they are, the other two as worded by :mod:`trainer.report.wording`.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from typing import TYPE_CHECKING, Any, Mapping, Optional, TextIO

from ..console import escape_what_is_missing, print_line, printable
from . import wording

if TYPE_CHECKING:
    from rich.console import Console

_BAR = 20  # characters of the bar in plain lines


class Display:
    """A bar over the steps of a run, with the last figures below it; or JSON, an object a line.

    Files, pipes (horovodrun prefixes every line with its rank) and terminals that cannot move their
    cursor (``TERM=dumb``) get plain lines instead of a bar. ``log_format`` is ``monitor``'s.
    """

    def __init__(
        self,
        log_format: str,
        first_step: int,
        last_step: int,
        stream: Optional[TextIO] = None,
        ranks: int = 1,
    ):
        self._json = log_format == "json"
        self._stream = stream or sys.stdout
        self._first, self._last = first_step, last_step
        self._started = time.monotonic()
        self._live: Optional[_LiveBar] = None
        escape_what_is_missing(self._stream)
        if self._stream.isatty() and not self._json:
            from rich.console import Console  # imported late: files and pipes do not need it

            console = Console(file=self._stream)
            if console.is_interactive:
                self._live = _LiveBar(console, wording.of_ranks(ranks), first_step, last_step)

    def show(self, event: str, figures: Mapping[str, Any]) -> None:
        """Show an event, in words if there are any for it; of a step in JSON also the time left."""
        if self._json:
            left = {"seconds_left": self._seconds_left(figures["step"])} if event == "step" else {}
            print_line(json_line(event, {**figures, **left}), self._stream)
            return
        text = wording.text(event, figures)
        if event == "step":
            self.figures(figures["step"], text)
        elif text:
            self.line(text)

    def step(self, step: int) -> None:
        """``step`` steps are done."""
        if self._live:
            self._live.update(step)

    def figures(self, step: int, text: str) -> None:
        """Show the figures read after ``step`` steps."""
        if self._live:
            self._live.update(step, text)
            return
        bar = "=" * round(_BAR * step / self._last)
        seconds = self._seconds_left(step)
        left = "" if seconds is None else f"  {wording.minutes(seconds)} left"
        self.line(f"[{bar:{_BAR}}] {step}/{self._last} {text}{left}")

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if self._live:
            self._live.print(text)
        else:
            print_line(text, self._stream)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live:
            self._live.close()

    def _seconds_left(self, step: int) -> Optional[int]:
        """None up to the first step, in which nets are compiled, and after the last."""
        made = step - self._first
        if made <= 1 or step >= self._last:
            return None
        return round((time.monotonic() - self._started) * (self._last - step) / made)


class _LiveBar:
    """Two rows at the bottom of the terminal: the bar, and below it the latest figures."""

    def __init__(self, console: Console, ranks: str, first_step: int, last_step: int):
        from rich import progress
        from rich.console import Group
        from rich.live import Live
        from rich.text import Text

        wide = progress.BarColumn(bar_width=None)  # the remaining width
        columns = wide, progress.MofNCompleteColumn(), progress.TimeRemainingColumn()
        self._bar = progress.Progress("{task.description}", *columns, expand=True)
        self._task = self._bar.add_task(ranks, total=last_step, completed=first_step)
        self._figures = Text(no_wrap=True, overflow="crop")
        self._console = console
        self._live = Live(Group(self._bar, self._figures), console=console, refresh_per_second=10)
        self._live.start()

    def update(self, step: int, figures: Optional[str] = None) -> None:
        """``step`` steps are done; the figures stay if none are given."""
        self._bar.update(self._task, completed=step)
        if figures is not None:
            self._figures.plain = figures

    def print(self, text: str) -> None:
        """Print lines above the bar, not wrapped by us, so that they can be copied."""
        shown = printable(text)
        self._console.print(shown, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


def json_line(event: str, figures: Mapping[str, Any]) -> str:
    """The event as strict JSON, with the time; non-finite numbers become null."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    return json.dumps({"event": event, "time": now, **wording.finite(figures)}, allow_nan=False)

"""Ends a rank that hangs, printing its stacks, so that its peers do not wait for it indefinitely.

Horovod's stall inspector does not work under Gloo: a live rank that stops submitting tensors hangs
all others. When it exits, the others raise at once.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

from ..console import print_line

EXIT_CODE = 70  # EX_SOFTWARE


class Watchdog:
    """Ends the process, named ``who`` in the message, ``seconds`` after the last :meth:`beat`.

    Time in which the process itself is stopped (Ctrl-Z, a job that Slurm suspends) does not count.
    """

    def __init__(self, seconds: float, who: str):
        self._seconds = seconds
        self._who = who
        self._beats = 0
        self._doing = "starting"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def beat(self, doing: str) -> None:
        """Reset the timer; ``doing`` says what begins now, for the message."""
        self._doing = doing
        self._beats += 1

    def _watch(self) -> None:
        pause = min(1.0, self._seconds / 4)
        still, seen, before = 0.0, 0, time.monotonic()
        while not self._stopped.wait(pause):
            now, beats = time.monotonic(), self._beats
            # Much more than a pause passes only where this thread was stopped as well.
            still = still + min(now - before, 2 * pause) if beats == seen else 0.0
            before, seen = now, beats
            if still > self._seconds:
                self._bark(still)

    def _bark(self, still: float) -> None:
        print_line(
            f"{self._who} stood still for {still:.0f} s at "
            f"{self._doing} (train.watchdog_seconds is {self._seconds:g}); it ends here. Either "
            "it hangs, or it waits for a rank that does. Its stacks:",
            sys.stderr,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_CODE)

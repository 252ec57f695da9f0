"""Asks a command of the user how many ranks this machine can run now."""

from __future__ import annotations

import re
import subprocess
import time
from typing import Optional

from launch.process import say

TIMEOUT_SECONDS = 60


class Discovery:
    """The number of slots that a shell command prints; it is run every `every` seconds."""

    def __init__(self, command: str, every: float) -> None:
        self.every = every
        self._command = command
        self._found: Optional[int] = None
        self._asked = 0.0
        self._running: Optional[subprocess.Popen] = None

    def ask(self) -> int:
        """Runs the command and returns the number of slots.

        If it fails, that is reported and the previous number stays. Raises ValueError if there is
        no previous number.
        """
        try:
            self._found = self._answer()
        except ValueError as error:
            if self._found is None:
                raise
            say(f"{error}; it stays at {self._found}")
        return self._found

    def poll(self) -> Optional[int]:
        """The number of slots if an answer has just arrived, else None; never waits."""
        if self._running is None and time.monotonic() - self._asked > self.every:
            self._start()
        if self._running is None or self._running.poll() is None:
            return None
        return self.ask()

    def _start(self) -> subprocess.Popen:
        self._asked = time.monotonic()
        command = ["timeout", "--kill-after=5", str(TIMEOUT_SECONDS), "sh", "-c", self._command]
        self._running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        return self._running

    def _answer(self) -> int:
        process = self._running or self._start()
        out = process.communicate()[0].decode(errors="replace").strip()
        self._running = None
        if process.returncode or not re.fullmatch("[0-9]{1,4}", out):
            raise ValueError(
                f"--discover {self._command!r} printed {out[:60]!r} and ended with exit code "
                f"{process.returncode} (124: not within {TIMEOUT_SECONDS} s); it must print the "
                "number of ranks that can run now, and end with 0"
            )
        return int(out)

"""Asks a command of the user how many ranks this machine can run now."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from typing import Optional

from ..core.process import say

TIMEOUT_SECONDS = 60


class Discovery:
    """The number of slots that a shell command prints; it is run every `every` seconds."""

    def __init__(self, command: str, every: float) -> None:
        self.every = every
        self._command = command
        self._found: Optional[int] = None
        self._complaint = ""
        self._started = 0.0
        self._running: Optional[subprocess.Popen[bytes]] = None

    def ask(self) -> None:
        """Starts the command unless it is running; `poll` returns its answer."""
        if self._running is None:
            self._started = time.monotonic()
            self._running = subprocess.Popen(
                ["sh", "-c", self._command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                start_new_session=True,  # so that `close` reaches the command's children too
            )

    def poll(self) -> Optional[int]:
        """The number of slots if an answer has just arrived, else None; never waits.

        If the command fails, that is reported once and the previous number stays. Raises ValueError
        if there is no previous number.
        """
        if time.monotonic() - self._started > self.every:
            self.ask()
        process, late = self._running, time.monotonic() - self._started > TIMEOUT_SECONDS
        if process is None or (process.poll() is None and not late):
            return None
        self.close()
        try:
            self._found, self._complaint = self._number(process), ""
        except ValueError as error:
            if self._found is None:
                raise
            if self._complaint != str(error):
                say(f"{error}; it stays at {self._found}")
            self._complaint = str(error)
        return self._found

    def close(self) -> None:
        """Ends the command if it is running."""
        if self._running is not None and self._running.poll() is None:
            os.killpg(self._running.pid, signal.SIGKILL)
            self._running.wait()
        self._running = None

    def _number(self, process: subprocess.Popen[bytes]) -> int:
        """Parses what the finished command has printed."""
        assert process.stdout is not None
        with process.stdout as stdout:
            os.set_blocking(stdout.fileno(), False)  # a process it left running may hold the pipe
            out = (stdout.read() or b"").decode(errors="replace").strip()
        if process.returncode or not re.fullmatch("[0-9]{1,4}", out):
            raise ValueError(
                f"--discover {self._command!r} printed {out[:60]!r} and ended with exit code "
                f"{process.returncode} (-9: not within {TIMEOUT_SECONDS} s); it must print the "
                "number of ranks that can run now, and end with 0"
            )
        return int(out)

"""The process of one rank: starts it, forwards its output and keeps the last lines."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence

import psutil

from .process import LINE_OR_BAR, TAIL_LINES, drain, found_no_peer, lacks_cause


class RankProcess:
    """A rank that runs `command`, in its own session.

    With `inherit` it writes to the launcher's terminal; otherwise its last lines are kept, and each
    line is printed after `prefix`, or not at all if that is None. `prepare`, if any, runs in
    the child before the command.
    """

    def __init__(
        self,
        rank: int,
        command: Sequence[str],
        env: Dict[str, str],
        prepare: Optional[Callable[[], None]],
        prefix: Optional[str],
        inherit: bool = False,
    ) -> None:
        pipe = None if inherit else subprocess.PIPE
        self.rank = rank
        self._tail: Deque[bytes] = deque(maxlen=TAIL_LINES)
        self._prefix = None if prefix is None else prefix.encode()
        self.lost_a_peer = False  # as far as its output is known
        self.ended = False  # with all that a signal has reached
        self._warned = False
        self.process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,  # so that signals reach the rank's own children too
            preexec_fn=prepare,
        )

    def watch(self, events: queue.SimpleQueue[Any], patience: float) -> None:
        """Starts threads that drain the rank's output and put it into `events` when it ends.

        A shell ends at the first signal: what it has started then gets `patience` seconds more.
        """
        drains = drain(self.process, self._note, LINE_OR_BAR)

        def wait() -> None:
            self.process.wait()
            deadline = time.monotonic() + patience
            while self._warned and self._has_children() and time.monotonic() < deadline:
                time.sleep(0.1)
            self.ended = True
            for thread in drains:
                thread.join(timeout=1.0)  # a grandchild may hold the pipe open
            events.put(self)

        threading.Thread(target=wait, daemon=True).start()

    def last_lines(self) -> List[str]:
        return [line.decode(errors="replace").rstrip("\r\n") for line in self._tail]

    def lacks_cause(self) -> bool:
        return self.lost_a_peer or lacks_cause(self.process.returncode > 0, self.last_lines())

    def found_no_peer(self) -> bool:
        """Whether it could not connect to a peer that was there; Gloo aborts, which may be all."""
        if self.process.stdout is None:  # it has the terminal
            return self.process.returncode == -signal.SIGABRT
        return found_no_peer(self.last_lines())

    def is_stopped(self) -> bool:
        """Whether the process is stopped (SIGSTOP)."""
        try:
            return bool(psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED)
        except (psutil.Error, OSError):  # it is gone; or /proc cannot be read now
            return False

    def _has_children(self) -> bool:
        """Whether a process that `signal` reaches runs; killpg would count one that is dead."""
        for pid in psutil.pids():
            with suppress(psutil.Error, OSError):
                status = psutil.Process(pid).status()
                if os.getpgid(pid) == self.process.pid and status != psutil.STATUS_ZOMBIE:
                    return True
        return False

    def signal(self, signum: int) -> None:
        """Sends a signal to the rank and its child processes."""
        self._warned = True
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def _note(self, line: bytes) -> Optional[bytes]:
        text = line.rstrip(b"\r\n")
        if self._tail and self._tail[-1].endswith(b"\r"):  # a progress bar, which moves on
            self._tail.pop()
        self._tail.append(line)
        # Checked now, because a traceback longer than the kept lines may follow.
        self.lost_a_peer = self.lost_a_peer or lacks_cause(False, [line.decode("latin-1")])
        if self._prefix is None or line == b"\r":
            return None
        return self._prefix + text + (line[len(text) :] or b"\n")

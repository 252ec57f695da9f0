"""Writing checkpoints in a background thread while training goes on."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Callable, Optional

from .files import SaveError, Snapshot, write
from .run_folder import prune

HANGS_AFTER = 3600.0  # seconds in which a save counts as progress, however slow the disk
_MOMENT = 0.2

# nice(1) value of the writing thread: it gets only the CPU time that training leaves.
_NICENESS = 19


class Saver:
    """Writes the checkpoints of a run below ``folder``, on rank 0.

    At most one save is under way; the next waits for it. A failed save is reported and does not end
    the run, which saves again when the next is due; :meth:`wait` tells whether the last succeeded.

    Besides the best it keeps the newest ``keep`` ones. Called are ``report`` with one line for each
    save that failed, ``saved``, in the caller's thread, with each checkpoint that was written, and
    ``beat`` again and again while the caller waits for a save that does not hang.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        report: Callable[[str], None],
        saved: Callable[[Path], None] = lambda path: None,
        beat: Callable[[], None] = lambda: None,
    ):
        self._folder, self._keep, self._report, self._saved = folder, keep, report, saved
        self._beat, self._began = beat, 0.0
        self._thread = ThreadPoolExecutor(1, "checkpoint", _lower_priority)
        self._under_way: Optional[Future] = None
        self._failure: Optional[str] = None

    def begin(self, content: Snapshot) -> None:
        """Start writing a checkpoint in the background; none may be under way."""
        assert self._under_way is None
        self._began = time.monotonic()
        self._under_way = self._thread.submit(self._write, content)

    def _write(self, content: Snapshot) -> Path:
        path = write(self._folder, content)
        with contextlib.suppress(OSError):  # the save is good; the next one prunes
            prune(self._folder, self._keep)
        return path

    def poll(self) -> None:
        """Report a save that has ended, if any, without waiting."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def ends_soon(self) -> bool:
        """Whether no save is under way, now or in a moment."""
        if self._under_way is None or wait([self._under_way], _MOMENT).done:
            return True
        if time.monotonic() - self._began < HANGS_AFTER:
            self._beat()
        return False

    def wait(self) -> Optional[str]:
        """Wait for the save under way, if any; returns why the last save failed, or None."""
        while not self.ends_soon():
            pass
        if self._under_way is not None:
            finished, self._under_way = self._under_way, None
            self._failure = None
            try:
                self._saved(finished.result())
            except SaveError as error:
                self._failure = str(error)
                self._report(f"{error}; the older ones are as they were")
        return self._failure


def _lower_priority() -> None:
    with contextlib.suppress(OSError):  # threads have their own niceness on Linux only
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)

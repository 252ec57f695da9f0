"""Saving beside training: checkpoints are written by a thread of their own, one at a time."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Optional

from . import checkpoint

# The thread's, as of nice(1): it takes what training leaves of the processors.
_NICENESS = 19


class Saver:
    """Writes the checkpoints of a run below ``folder``, rank 0's alone.

    One save is under way at most: the next waits for it, so that none that was due is left out.
    A save that fails is told and does not end the run, which saves again when it is next due;
    whether the last one was written is for the end of the run to ask (:meth:`wait`).

    Args:
        keep: newest checkpoints that are left, besides the best.
        report: is told in one line of each save that failed.
        saved: is told of each checkpoint that was written, by the thread that waits for it.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        report: Callable[[str], None],
        saved: Callable[[Path], None] = lambda path: None,
    ):
        self._folder, self._keep, self._report, self._saved = folder, keep, report, saved
        self._thread = ThreadPoolExecutor(1, "checkpoint", _step_back)
        self._under_way: Optional[Future] = None
        self._failure: Optional[str] = None

    def begin(self, content: checkpoint.Snapshot) -> None:
        """Write a checkpoint in the background; none may be under way."""
        assert self._under_way is None
        self._under_way = self._thread.submit(checkpoint.write, self._folder, content, self._keep)

    @property
    def under_way(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._under_way is not None and not self._under_way.done()

    def look(self) -> None:
        """Tell of a save that has ended meanwhile; waits for nothing."""
        if not self.under_way:
            self.wait()

    def wait(self) -> Optional[str]:
        """Wait until no save is under way; why the last one failed, None if it did not."""
        if self._under_way is not None:
            ended, self._under_way = self._under_way, None
            self._failure = None
            try:
                self._saved(ended.result())
            except checkpoint.SaveError as error:
                self._failure = str(error)
                self._report(f"{error}; the older ones are as they were")
        return self._failure


def _step_back() -> None:
    with contextlib.suppress(OSError):  # elsewhere than on Linux a thread has no niceness
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)

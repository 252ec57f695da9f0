"""Graceful stop: SIGTERM or SIGUSR1 on any rank stops all of them after the same step.

So do a closed terminal (SIGHUP, unless under nohup) and ctrl-C on a process that trains alone;
launchers turn both into SIGTERM for their ranks.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, Callable, Dict, Optional

import numpy as np

from ..console import print_line
from . import environment
from .collectives import allreduce_sum_, any_rank
from .ranks import world_size
from .small_sums import sums_are_cheap

# Exit code of a rank that was stopped and has saved: the job should be started again.
EXIT_CODE = 85


class StopRequest:
    """A flag that a signal, or a clock, sets on any rank; all ranks see it after the same step.

    Where an allreduce takes milliseconds, that of step n overlaps step n + 1 and is read after it.
    """

    def __init__(self, minutes: Optional[float] = None) -> None:
        """The flag is set after so many ``minutes``; None: by signals alone."""
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.interrupted = False  # by ctrl-C, once
        self.requested = False
        self._polled = False  # training has begun: the flag is read, and there is state to save
        self._pending: Optional[Any] = None
        self._previous: Dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        handlers: Dict[int, Callable[[int, Optional[FrameType]], Any]]
        handlers = {signal.SIGTERM: self._request, signal.SIGUSR1: self._request}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
            handlers[signal.SIGHUP] = self._request
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            handlers[signal.SIGINT] = self._interrupt
        for number, handler in handlers.items():
            try:
                self._previous[number] = signal.signal(number, handler)
            except ValueError:  # not in the main thread, where alone handlers can be set
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        self.requested = True

    def _interrupt(self, number: int, frame: Optional[FrameType]) -> None:
        if self._polled and not self.interrupted and environment.size() == 1:
            self.requested = self.interrupted = True
            print_line("interrupted: saving after this step; ctrl-C again ends at once", sys.stderr)
        else:
            _raise_interrupt(number, frame)

    def agreed(self) -> bool:
        """Whether all ranks should stop now; called once per step on every rank; collective."""
        self._polled = True
        self.requested = self.requested or time.monotonic() >= self._end
        if world_size() == 1:
            return self.requested
        if sums_are_cheap():
            return any_rank(self.requested, "stop_request")
        import mxnet as mx

        stop = self._pending is not None and bool(self._pending.asnumpy()[0])
        flag = mx.nd.array(np.array([self.requested], np.int32), dtype=np.int32)
        self._pending = allreduce_sum_(flag, "stop_request")
        return stop


def _raise_interrupt(number: int, frame: Optional[FrameType]) -> None:
    """Raise KeyboardInterrupt; within a destructor, which would swallow it, a moment later."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":  # MXNet's arrays have one
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt

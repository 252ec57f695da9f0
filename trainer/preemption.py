"""Being told to stop: SIGTERM or SIGUSR1 to any rank stops all of them after the same step.

So does the end of the terminal (SIGHUP, unless nohup is in front), and ctrl-C on a process that
trains alone; launchers turn both into SIGTERM for their ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Callable, Dict, Optional

import numpy as np

from . import dist, launched
from .console import print_line

# What a rank that was stopped so, and saved, exits with: the job wants to be started again.
EXIT_CODE = 85


class StopRequest:
    """A flag that signals set on any rank and that all ranks see after the same step.

    Where a sum over ranks takes long, that of step n is made while step n + 1 is computed and read
    after it, so that nobody waits for it.
    """

    def __init__(self) -> None:
        self.interrupted = False  # the first ctrl-C came, and asks for a stop
        self._asked = False
        self._saves = False  # there is something to save, and somebody who looks at the flag
        self._pending: Optional[Any] = None
        self._previous: Dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        handlers: Dict[int, Callable[[int, Optional[FrameType]], Any]]
        handlers = {signal.SIGTERM: self._ask, signal.SIGUSR1: self._ask}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup has it ignored
            handlers[signal.SIGHUP] = self._ask
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            handlers[signal.SIGINT] = self._interrupt
        for number, handler in handlers.items():
            try:
                self._previous[number] = signal.signal(number, handler)
            except ValueError:  # not the main thread (a notebook's): signals are not ours there
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def _interrupt(self, number: int, frame: Optional[FrameType]) -> None:
        if self._saves and not self.interrupted and launched.size() == 1:
            self._asked = self.interrupted = True
            print_line("interrupted: saving after this step; ctrl-C again ends at once", sys.stderr)
        else:
            _raise_interrupt(number, frame)

    def agreed(self) -> bool:
        """Whether all ranks are to stop now; every rank calls it once a step."""
        self._saves = True
        if dist.world_size() == 1:
            return self._asked
        if dist.ranks_share_memory():
            return dist.any_rank(self._asked, "stop_request")
        import mxnet as mx

        stop = self._pending is not None and bool(self._pending.asnumpy()[0])
        flag = mx.nd.array(np.array([self._asked], np.int32), dtype=np.int32)
        self._pending = dist.allreduce_sum_(flag, "stop_request")
        return stop


def _raise_interrupt(number: int, frame: Optional[FrameType]) -> None:
    """Raise KeyboardInterrupt, as Python does; a moment later where a destructor would lose it."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":  # MXNet's arrays have one
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt

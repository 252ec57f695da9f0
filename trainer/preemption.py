"""Being told to stop: SIGTERM or SIGUSR1 to any rank stops all of them after the same step."""

from __future__ import annotations

import signal
from typing import Any, Dict, Optional

import numpy as np

from . import dist

# What a rank that was stopped so, and saved, exits with: the job wants to be started again.
EXIT_CODE = 85


class StopRequest:
    """A flag that signals set on any rank and that all ranks see after the same step.

    The flags of step n are summed over ranks while step n + 1 is computed and read after it, so
    that nobody waits for the sum.
    """

    def __init__(self) -> None:
        self._asked = False
        self._pending: Optional[Any] = None
        self._previous: Dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            try:
                self._previous[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread (a notebook's): signals are not ours there
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether all ranks are to stop now; every rank calls it once a step."""
        if dist.world_size() == 1:
            return self._asked
        import mxnet as mx

        stop = self._pending is not None and bool(self._pending.asnumpy()[0])
        flag = mx.nd.array(np.array([self._asked], np.int32), dtype=np.int32)
        self._pending = dist.allreduce_sum_(flag, "stop_request")
        return stop

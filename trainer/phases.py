"""Where the time of a step goes: each phase waited for, so that it is its own and no other's."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Callable, Dict, Iterator

import mxnet as mx
from mxnet import gluon

from . import dist

PHASES = ("data", "forward", "backward", "ranks", "allreduce", "update", "other")
MEANINGS = {
    "data": "wait for the batch",
    "forward": "forward",
    "backward": "loss and backward",
    "ranks": "wait for the slowest rank",
    "allreduce": "allreduce of gradients",
    "update": "update",
    "other": "other",
}


class PhaseClock:
    """Adds up seconds by phase.

    Args:
        wait: returns when the device has done all that it was given.
        clock: seconds, rising.
    """

    def __init__(
        self,
        wait: Callable[[], Any] = mx.nd.waitall,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.seconds: Dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._wait, self._clock = wait, clock
        self._phase, self._since = "other", clock()

    def enter(self, phase: str) -> None:
        """Wait for the device, close the phase that it was in, and begin ``phase``."""
        self._wait()
        now = self._clock()
        self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now


@contextlib.contextmanager
def watched(net: gluon.Block, trainer: gluon.Trainer, clock: PhaseClock) -> Iterator[None]:
    """While it lasts, ``train_step`` with ``net`` and ``trainer`` tells ``clock`` its phases.

    The step itself is not touched: what stands between the end of the net's forward and the
    allreduce is the loss and the backward. Collectives of synced norm are within those two.
    """
    allreduce_grads, update = trainer.allreduce_grads, trainer.update

    def timed_allreduce() -> None:
        clock.enter("ranks")
        dist.barrier()
        clock.enter("allreduce")
        allreduce_grads()
        clock.enter("other")

    def timed_update(*args: Any, **kwargs: Any) -> None:
        clock.enter("update")
        update(*args, **kwargs)
        clock.enter("other")

    hooks = [
        net.register_forward_pre_hook(lambda *_: clock.enter("forward")),
        net.register_forward_hook(lambda *_: clock.enter("backward")),
    ]
    trainer.allreduce_grads, trainer.update = timed_allreduce, timed_update
    try:
        yield
    finally:
        del trainer.allreduce_grads, trainer.update
        for hook in hooks:
            hook.detach()

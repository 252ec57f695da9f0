"""Times the phases of a step, waiting for the device after each to tell them apart."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Callable, Dict, Iterator

import mxnet as mx
from mxnet import gluon

from .. import dist

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
        wait: returns when the device has finished all enqueued work.
        clock: a monotonic clock, in seconds.
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
        """Wait for the device, end the current phase and begin ``phase``."""
        self._wait()
        now = self._clock()
        self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now


@contextlib.contextmanager
def watched(net: gluon.Block, trainer: gluon.Trainer, clock: PhaseClock) -> Iterator[None]:
    """Within it, ``train_step`` with ``net`` and ``trainer`` reports its phases to ``clock``.

    The step itself is not changed. What happens between the net's forward and the allreduce is the
    loss and backward; collectives of synced batch norm are part of forward and backward.
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

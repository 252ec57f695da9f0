"""Who this rank is, and how many there are.

A process without a launcher is rank 0 of 1: Horovod is not even imported.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from typing import Any, Iterator

from ..errors import ConfigError
from . import environment

BUILD_HOROVOD = (  # as launch/core/rendezvous.py says it too
    "Horovod has no wheel, so build it in this environment, after MXNet: "
    "`HOROVOD_WITH_MXNET=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 "
    "HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 "
    "pip install --no-build-isolation horovod==0.28.1` (it needs cmake < 4, make and g++ < 14)"
)


@functools.lru_cache(maxsize=None)
def horovod() -> Any:
    """``horovod.mxnet``, or None in a process that is alone; LaunchError where it is not built."""
    if environment.size() == 1:
        return None
    try:
        import horovod.mxnet as hvd
    except ModuleNotFoundError as missing:
        raise environment.LaunchError(f"{missing}; {BUILD_HOROVOD}") from None
    return hvd


def allow_timeline() -> None:
    """Make :func:`timeline` possible; before ``dist.init()``."""
    os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"


@contextlib.contextmanager
def timeline(path: str) -> Iterator[None]:
    """Record Horovod's timeline within the block, in Chrome's trace format; on every rank.

    Rank 0 writes ``path``: the phases of every collective and when each rank was ready for it. The
    file is complete after ``dist.shutdown()``.
    """
    with contextlib.ExitStack() as recording:
        if (hvd := horovod()) is not None:
            hvd.start_timeline(path)
            recording.callback(hvd.stop_timeline)
        yield


def finish_work() -> None:
    """At exit, before Horovod: without it MXNet would wait for ever for sums that are under way.

    If they need a rank that does not come, for as long as Horovod would wait; and not where the
    program has failed, of which its peers are to hear at once.
    """
    if hasattr(sys, "last_value"):  # an exception that nobody has caught
        return
    import mxnet as mx

    def wait() -> None:
        with contextlib.suppress(mx.MXNetError):  # whoever has waited for it has been told
            mx.nd.waitall()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(environment.patience())


def crash_at_once() -> None:
    """In a forked process, as readers of data are: a crash ends it, and whoever waits hears of it.

    MXNet's handlers call exit(), within which Horovod would wait for threads that are not there.
    """
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)


def _place(what: str, alone: int) -> int:
    hvd = horovod()
    if hvd is None:
        return alone
    if not hvd.is_initialized():
        raise RuntimeError(
            "this process has not joined its job yet, or has left it: call trainer.dist.init() "
            "first, and dist.shutdown() last"
        )
    return int(getattr(hvd, what)())


def rank() -> int:
    """The rank of this process, from 0."""
    return _place("rank", 0)


def world_size() -> int:
    """The number of ranks. As its kin, raises RuntimeError before ``dist.init()``."""
    return _place("size", 1)


def local_rank() -> int:
    """The rank of this process among those of its node, from 0."""
    return _place("local_rank", 0)


def local_size() -> int:
    """The number of ranks on this node."""
    return _place("local_size", 1)


def is_root() -> bool:
    """Whether this is rank 0, the only one that writes files and prints."""
    return rank() == 0


def visible_gpus() -> int:
    """The number of GPUs here, 0 without a device or CUDA; ConfigError if the driver is broken."""
    import mxnet as mx

    try:
        return int(mx.context.num_gpus())
    except mx.MXNetError as error:
        raise ConfigError(
            f"NVIDIA's driver does not work ({last_line(error).split(' : ')[-1]}), and this MXNet "
            "needs it even on the CPU; `nvidia-smi` must answer, or install the CPU build"
        ) from error


def last_line(error: Exception) -> str:
    """Of MXNet's message, which begins with a traceback."""
    return str(error).strip().splitlines()[-1]

"""The collectives between ranks.

In a process without a launcher, rank 0 of 1, every collective returns its argument, or a copy.
They are sums and broadcasts; a mean is left to the caller, who divides once, by the global count.

Every rank must call the same collectives in the same order. ``name`` matches a call with its
counterparts on the other ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import threading
import types
import zlib
from typing import TYPE_CHECKING, Any, Iterator, List, Optional

import numpy as np

from ..errors import ConfigError
from . import environment, ranks, shared_memory
from .ranks import finish_work, horovod, is_root, local_size, rank, visible_gpus, world_size
from .small_sums import allreduce_by_horovod, gather, ranks_share_memory, small_sums, way

if TYPE_CHECKING:
    import mxnet as mx


_left = threading.Event()  # set once this process is no rank of its job any more
_adding = threading.Lock()


def init(steps_in_memory: bool = False, on_cpu: bool = False) -> None:
    """Join the other ranks; the first call of every rank. Calling it again is harmless.

    Args:
        steps_in_memory: if the ranks can share memory, training steps make no Horovod collective.
        on_cpu: the ranks will not compute on GPUs, although there may be some.

    Raises:
        NotJoinedError: the launcher started several processes, but Horovod joins only some.
        LaunchError: the environment names ranks, but no launcher started them.
    """
    environment.check()
    hvd = horovod()
    if hvd is None or hvd.is_initialized():
        return
    if _left.is_set():
        raise environment.LaunchError(
            "this process has left its job, by dist.shutdown(), and Horovod cannot join twice; "
            "start the ranks anew"
        )
    # Nothing is fused. Buckets of gradients (step/buckets.py) need no copies in Horovod's buffer,
    # and with whatever else is in flight the order of summation would change from run to run on
    # three ranks or more.
    os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
    gpus = 0
    if not on_cpu:
        with contextlib.suppress(ConfigError):  # the start says so, once for all ranks
            gpus = visible_gpus()
    one_node = environment.local_size() == environment.size()
    if gpus == 0:
        in_memory = steps_in_memory and one_node and shared_memory.possible()
        os.environ.setdefault("HOROVOD_CYCLE_TIME", f"{_cycle_time(in_memory):g}")
    # Dynamic process sets, for those of nodes and leaders, double the messages of each cycle.
    hvd.init(process_sets=None if one_node or environment.one_rank_per_node() else "dynamic")
    atexit.register(finish_work)
    os.register_at_fork(after_in_child=ranks.crash_at_once)
    if hvd.size() != environment.size():
        raise environment.NotJoinedError(environment.size(), hvd.size())
    way()


def _cycle_time(in_memory: bool) -> float:
    """Milliseconds between two rounds of Horovod's background thread, for ranks on CPUs.

    In each round the ranks tell each other what is ready, even with nothing to do, on the cores
    that compute: at Horovod's millisecond, between two hosts, this took 30 % of a core. The fewer
    cores a rank has, the more that costs, and the longer are its steps.
    """
    return 100 if in_memory else max(1, 10 / environment.threads())


def settle() -> None:
    """Return when nothing is in flight on any rank, so that they may end; collective.

    For an error of all ranks: whoever catches it may go on, as with another run.
    """
    import mxnet as mx

    mx.nd.waitall()
    hvd = horovod()
    if hvd is not None and hvd.is_initialized():
        barrier()
        if local_size() < world_size():
            # What a node has sent may be lost with it, until the others have received it.
            allreduce_by_horovod(np.zeros(1), "settle")


def shutdown() -> None:
    """Leave the job for good, once nothing is in flight, which would kill the peers; collective."""
    settle()
    hvd = horovod()
    if hvd is not None and hvd.is_initialized():
        hvd.shutdown()
        _left.set()
    node_process_set.cache_clear()
    way.cache_clear()
    leaders_process_set.cache_clear()


# The process set of a rank alone, of which Horovod need not know.
_ALONE = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def _makes_process_sets() -> bool:
    """Whether Horovod does: not where the program has called a plain ``hvd.init()`` itself."""
    return os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS", "0") != "0"


@functools.lru_cache(maxsize=None)
def node_process_set() -> Any:
    """The Horovod process set of this node's ranks; None where that is all ranks; collective.

    Raises ConfigError where Horovod makes none.
    """
    if local_size() == world_size():
        return None
    if environment.one_rank_per_node():
        return _ALONE
    if not _makes_process_sets():
        raise ConfigError(
            "hvd.init() has been called without process sets, which batch_norm=group needs; call "
            'hvd.init(process_sets="dynamic"), or leave that to the trainer'
        )
    hosts = gather_objects(environment.hostname())
    places = {host: [r for r, h in enumerate(hosts) if h == host] for host in sorted(set(hosts))}
    sets = {host: horovod().add_process_set(own) for host, own in places.items()}
    return sets[hosts[rank()]]


@functools.lru_cache(maxsize=None)
def leaders_process_set() -> Any:
    """The Horovod process set of each node's first rank; None where that is all; collective.

    None too where there is one node, or where Horovod makes none.
    """
    if local_size() == world_size() or not _makes_process_sets():
        return None
    hosts = gather_objects(environment.hostname())
    leaders = [hosts.index(host) for host in dict.fromkeys(hosts)]
    return None if len(leaders) == len(hosts) else horovod().add_process_set(leaders)


def allreduce_sum(values: Any, name: str) -> np.ndarray:
    """The sum over ranks of a small array (any shape; float or int), in its own dtype.

    It may also be given as a number, a list or an NDArray. Raises TypeError for what holds no
    numbers, but say booleans; OverflowError, on every rank, where a sum of integers is too large
    for their dtype; RuntimeError where a peer calls with another name or shape, or, without
    Horovod, has died, or where another thread of this process adds up: threads have no order.
    """
    values = values.asnumpy() if hasattr(values, "asnumpy") else np.array(values)
    if values.dtype.kind not in "iuf":
        raise TypeError(f"{name} is of {values.dtype}; give numbers, booleans by .astype(int)")
    if world_size() == 1:
        return values
    if not _adding.acquire(blocking=False):
        raise RuntimeError(f"{name} is added up while another thread of rank {rank()} adds up")
    try:
        wide = np.float64 if values.dtype.kind == "f" else np.int64
        # The tag, a hash of what is summed, tells calls apart that do not belong together.
        tag, sums = zlib.crc32(f"{name} {values.shape}".encode()), small_sums()
        flat = np.append(wide(tag), values.astype(wide))
        size = flat.size if sums is None else sums.capacity
        for start in range(0, flat.size, size):
            part = flat[start : start + size]
            part[:] = allreduce_by_horovod(part, name) if sums is None else sums(part)
            if flat[0] != world_size() * tag:  # before the next part, which a peer may not have
                raise RuntimeError(f"the ranks differ in what they add up; rank {rank()}: {name}")
    finally:
        _adding.release()
    total = flat[1:].astype(values.dtype)
    if wide is np.int64 and (total != flat[1:]).any():
        raise OverflowError(f"the sum over ranks of {name} does not fit {values.dtype}; give int64")
    return total.reshape(values.shape)


def allreduce_sum_(tensor: mx.nd.NDArray, name: str, process_set: Any = None) -> mx.nd.NDArray:
    """Replace ``tensor`` by its sum over the ranks of ``process_set`` (None: all), asynchronously.

    Two calls in flight must not share a ``name``. Raises TypeError for integers of 8 bits, whose
    sums would wrap around, and booleans.
    """
    if np.dtype(tensor.dtype).kind in "iub" and np.dtype(tensor.dtype).itemsize == 1:
        raise TypeError(f"{name} is of {np.dtype(tensor.dtype)}; give int32, or another wide type")
    hvd = horovod()
    if hvd is None or process_set is _ALONE:
        return tensor
    process_set = hvd.global_process_set if process_set is None else process_set
    return hvd.allreduce_(tensor, average=False, name=name, process_set=process_set)


def any_rank(flag: bool, name: str) -> bool:
    """Whether ``flag`` is set on any rank; the same on every rank; collective."""
    return bool(allreduce_sum(np.array([int(flag)], np.int64), name)[0])


class PeerError(RuntimeError):
    """Another rank failed to start; its message, with its rank and host."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Run a part of the start, without collectives in it, that must succeed on every rank.

    If it fails anywhere, all ranks raise, with nothing in flight: those that failed their own
    error, the others a PeerError with the first failure.
    """
    error: Optional[Exception] = None
    try:
        yield
    except Exception as own:
        error = own
    if any_rank(error is not None, "together"):
        messages = gather_objects(error and f"{environment.where()}: {error}")
        first = next(message for message in messages if message is not None)
        settle()
        raise error or PeerError(first)


def barrier() -> None:
    """Return when every rank has called it."""
    allreduce_sum(np.zeros(1, np.int64), "barrier")


def gather_objects(value: Any) -> List[Any]:
    """Every rank's ``value``, see :func:`small_sums.gather`, in rank order; collective."""
    return gather(value, allreduce_sum)


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value``, see :func:`small_sums.gather`, on every rank; collective."""
    return gather_objects(value if is_root() else None)[0]


def broadcast_array(array: mx.nd.NDArray, name: str) -> mx.nd.NDArray:
    """A copy, on the CPU, of rank 0's ``array``, alike in shape and dtype everywhere; collective.

    It goes through the host because Horovod cannot broadcast an array that an inference forward has
    left in oneDNN's own layout.
    """
    import mxnet as mx

    return _broadcast_(mx.nd.array(array.asnumpy(), dtype=array.dtype), name)


def broadcast_parameters(parameters: Any) -> None:
    """Copy rank 0's parameters to all ranks; no shape may be deferred any more; collective.

    Args:
        parameters: an iterable of them, or, as Horovod has it, what ``collect_params`` returns.
    """
    import mxnet as mx

    # A forward under way may still change layouts. A rank whose broadcast fails of that would take
    # the next parameter's values for this one's.
    mx.nd.waitall()
    parameters = parameters.values() if hasattr(parameters, "values") else parameters
    for index, parameter in enumerate(parameters):
        _broadcast_(parameter.data(), f"parameter.{index}")


def _broadcast_(array: mx.nd.NDArray, name: str) -> mx.nd.NDArray:
    """Replace ``array``, on which the engine has no work, by rank 0's; a node gets it once."""
    hvd = horovod()
    if hvd is None:
        return array
    if array.context.device_type == "cpu":
        from .array_memory import memory_of

        host = memory_of(array)  # out of oneDNN's own layout, which Horovod cannot broadcast
        sums = small_sums()
        if sums is not None:
            # Sums nothing: it checks that all ranks broadcast the same array.
            allreduce_sum(np.zeros(0, np.int64), f"{name} {host.shape} {host.dtype}")
            leaders = leaders_process_set()
            if leaders is not None and ranks.local_rank() == 0:
                hvd.broadcast_(array, 0, name, process_set=leaders).wait_to_read()
            if leaders is not None or ranks_share_memory():
                sums.broadcast(host)
                return array
    return hvd.broadcast_(array, root_rank=0, name=name)

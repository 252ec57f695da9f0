"""Ranks and the collectives between them; the only file that imports horovod.

A process that no launcher started is rank 0 of 1: Horovod is then not even imported and every
collective returns its argument. Whatever crosses ranks here is a sum or a broadcast: what is a
mean is divided once, by the caller, by what was counted.

Collectives must be called by every rank in the same order. A ``name`` says which call of one rank
is to meet which call of the others.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import zlib
from typing import TYPE_CHECKING, Any, Iterable, Iterator, List, Optional

import numpy as np

from . import launched, shared_memory

if TYPE_CHECKING:
    import mxnet as mx

_CAPACITY = 2**15  # numbers of a small sum, or it is made in parts


@functools.lru_cache(maxsize=None)
def _horovod() -> Any:
    """``horovod.mxnet``, or None in a process that is alone."""
    if launched.size() == 1:
        return None
    import horovod.mxnet as hvd

    return hvd


class NotJoinedError(ValueError):
    """Processes that were started as ranks of one job are each alone."""

    def __init__(self, started: int, joined: int):
        super().__init__(
            f"{started} processes were started, but Horovod joins only {joined}, so that each would"
            " train a model of its own: under srun put `python -m launch slurm-rank --` before the "
            "command; in place of mpirun, which needs a Horovod built with MPI, use "
            f"`horovodrun -np {started}` or `python -m launch local -n {started} --`"
        )


def init(fixed_groups: bool = True, steps_in_memory: bool = False) -> None:
    """Join the other ranks. Every rank calls it once, before anything else here; again is harmless.

    Args:
        fixed_groups: gradients are reduced in groups of their own (see :func:`gluon_trainer`).
        steps_in_memory: where ranks on the CPUs of one node can share memory, the caller's steps
            need nothing of Horovod.

    Raises:
        NotJoinedError: the launcher has started several processes which do not find each other.
        LaunchError: no launcher has, whatever the environment says.
    """
    launched.check()
    hvd = _horovod()
    if hvd is None or hvd.is_initialized():
        return
    if fixed_groups:
        # Fusing a group with whatever else is in flight would change the order of summation from
        # run to run on three ranks and more. Without groups Horovod would then fuse nothing.
        os.environ.setdefault("HOROVOD_DISABLE_GROUP_FUSION", "1")
    one_node = launched.local_size() == launched.size()
    if one_node and not hvd.cuda_built() and shared_memory.possible():
        # Horovod's thread meets the others' once a cycle, each millisecond by default, whether or
        # not there is anything to do, and takes the time from the cores that compute.
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "200" if steps_in_memory else "10")
    # Sets that are added later, by node_process_set, cost twice the messages in each cycle.
    hvd.init(process_sets=None if one_node else "dynamic")
    if hvd.size() != launched.size():
        raise NotJoinedError(launched.size(), hvd.size())
    _memory()


def allow_timeline() -> None:
    """Make :func:`timeline` possible; before :func:`init`."""
    os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"


@contextlib.contextmanager
def timeline(path: str) -> Iterator[None]:
    """Horovod's timeline while it lasts, in Chrome's trace format; every rank takes part.

    Rank 0 writes ``path``, with every tensor's way and when each rank was ready for it; the file
    is complete after :func:`shutdown`.
    """
    hvd = _horovod()
    if hvd is not None:
        hvd.start_timeline(path)
    yield
    if hvd is not None:
        hvd.stop_timeline()


def shutdown() -> None:
    """Leave the other ranks. A rank that leaves with collectives in flight kills its peers."""
    import mxnet as mx

    mx.nd.waitall()
    hvd = _horovod()
    if hvd is not None and hvd.is_initialized():
        barrier()
        hvd.shutdown()
    node_process_set.cache_clear()
    _memory.cache_clear()


def rank() -> int:
    """This process among all, from 0."""
    hvd = _horovod()
    return hvd.rank() if hvd else 0


def world_size() -> int:
    """How many processes train together."""
    hvd = _horovod()
    return hvd.size() if hvd else 1


def local_rank() -> int:
    """This process among those of its node, from 0."""
    hvd = _horovod()
    return hvd.local_rank() if hvd else 0


def local_size() -> int:
    """How many processes of the job this node runs."""
    hvd = _horovod()
    return hvd.local_size() if hvd else 1


def is_root() -> bool:
    """Whether this is rank 0, the only one that writes."""
    return rank() == 0


@functools.lru_cache(maxsize=None)
def node_process_set() -> Any:
    """The Horovod process set of this node's ranks; None when it holds all ranks.

    Collective: every rank must ask for it, at the same place in the program.
    """
    if local_size() == world_size():
        return None
    hvd = _horovod()
    hosts = gather_objects(launched.hostname())
    own = None
    for host in sorted(set(hosts)):
        ranks = [r for r, h in enumerate(hosts) if h == host]
        process_set = hvd.add_process_set(ranks)
        if rank() in ranks:
            own = process_set
    return own


@functools.lru_cache(maxsize=None)
def _memory() -> Optional[shared_memory.SharedMemorySum]:
    """What small sums go through where all ranks share one node's memory; collective."""
    if local_size() < world_size():
        return None
    meet = functools.partial(_allreduce_by_horovod, name="shared_memory")
    return shared_memory.connect(_CAPACITY, rank(), world_size(), meet)


def ranks_share_memory() -> bool:
    """Whether :func:`allreduce_sum` takes microseconds, as all ranks share one node's memory."""
    return world_size() > 1 and _memory() is not None


def allreduce_sum(values: np.ndarray, name: str) -> np.ndarray:
    """The sum over ranks of a small host array (any shape; float or int), in its own dtype.

    Raises:
        RuntimeError: in shared memory: a rank has ended, or asks for the sum of another name.
    """
    if world_size() == 1:
        return values
    memory = _memory()
    if memory is None:
        return _allreduce_by_horovod(values, name)
    whole_numbers = np.issubdtype(values.dtype, np.integer)
    tag = zlib.crc32(f"{name} {values.shape}".encode())
    flat = np.append(values, tag).astype(np.int64 if whole_numbers else np.float64)
    for start in range(0, flat.size, memory.capacity):
        part = flat[start : start + memory.capacity]
        part[:] = memory(part)
    if flat[-1] != world_size() * tag:
        raise RuntimeError(f"the ranks differ in what they add up; rank {rank()}: {name}")
    return flat[:-1].astype(values.dtype).reshape(values.shape)


def _allreduce_by_horovod(values: np.ndarray, name: str) -> np.ndarray:
    import mxnet as mx

    tensor = mx.nd.array(values, dtype=values.dtype)
    return _horovod().allreduce(tensor, average=False, name=name).asnumpy()


def allreduce_sum_(tensor: mx.nd.NDArray, name: str, process_set: Any = None) -> mx.nd.NDArray:
    """Replace ``tensor`` by its sum over the ranks of ``process_set`` (None: all), asynchronously.

    Ranks meet by ``name``; two calls in flight must not share one.
    """
    hvd = _horovod()
    if hvd is None:
        return tensor
    process_set = hvd.global_process_set if process_set is None else process_set
    return hvd.allreduce_(tensor, average=False, name=name, process_set=process_set)


def any_rank(flag: bool, name: str) -> bool:
    """Whether ``flag`` is set on any rank; every rank gets the same answer."""
    return bool(allreduce_sum(np.array([int(flag)], np.int64), name)[0])


class PeerError(RuntimeError):
    """Another rank cannot start; its message, with its rank and host."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A part of the start that each rank does on its own, without collectives, and all must manage.

    If one does not, all ranks leave Horovod together, none with collectives in flight, and raise:
    those with an error that one, the others a PeerError with the first of them.
    """
    error: Optional[Exception] = None
    try:
        yield
    except Exception as own:
        error = own
    if any_rank(error is not None, "together"):
        messages = gather_objects(error and f"{launched.where()}: {error}")
        first = next(message for message in messages if message is not None)
        shutdown()
        raise error or PeerError(first)


def barrier() -> None:
    """Return when every rank has called it."""
    allreduce_sum(np.zeros(1, np.int64), "barrier")


def gather_objects(value: Any) -> List[Any]:
    """Every rank's ``value``, by rank. They travel between the processes of one job only."""
    # Not Horovod's own: it names objects by their types, and those of other types never meet.
    pickled = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.zeros(world_size(), np.int64)
    sizes[rank()] = pickled.size
    sizes = allreduce_sum(sizes, "object.sizes")
    places = np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1])
    together = np.zeros(sizes.sum(), np.uint8)
    together[places[rank()]] = pickled
    together = allreduce_sum(together, "object")
    return [pickle.loads(together[place].tobytes()) for place in places]


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` on every rank."""
    return gather_objects(value if is_root() else None)[0]


def broadcast_array(array: mx.nd.NDArray, name: str) -> mx.nd.NDArray:
    """A copy, on the CPU, of rank 0's ``array``, which has the same shape and dtype on every rank.

    The way through the host is deliberate: Horovod cannot broadcast an array that an inference
    forward has put into oneDNN's own layout.
    """
    import mxnet as mx

    values = array.asnumpy()
    if ranks_share_memory():
        return mx.nd.array(_broadcast_in_memory(values, name), dtype=array.dtype)
    copy = mx.nd.array(values, dtype=array.dtype)
    hvd = _horovod()
    return hvd.broadcast_(copy, root_rank=0, name=name) if hvd else copy


def _broadcast_in_memory(values: np.ndarray, name: str) -> np.ndarray:
    """Rank 0's ``values``, of any dtype: a sum of whole numbers to which the others add zeros."""
    numbers = np.zeros(-(-values.nbytes // 8), np.int64)
    if is_root():
        numbers.view(np.uint8)[: values.nbytes] = values.reshape(-1).view(np.uint8)
    numbers = allreduce_sum(numbers, name)
    return numbers.view(np.uint8)[: values.nbytes].view(values.dtype).reshape(values.shape)


def broadcast_parameters(parameters: Iterable[mx.gluon.Parameter]) -> None:
    """Give every rank rank 0's parameters, which must be initialised (no deferred shapes left)."""
    hvd = _horovod()
    if hvd is None:
        return
    import mxnet as mx

    from .placement import memory_of

    # A forward under way may still ask for new layouts. One rank whose broadcast fails of it would
    # take the next parameter's numbers for this one's.
    mx.nd.waitall()
    for index, parameter in enumerate(parameters):
        array = parameter.data()
        if ranks_share_memory():
            broadcast_array(array, f"parameter.{index}").copyto(array)
            continue
        if array.context.device_type == "cpu":
            memory_of(array)  # out of oneDNN's own layout, which Horovod cannot broadcast
        hvd.broadcast_(array, root_rank=0, name=f"parameter.{index}")


def gluon_trainer(
    parameters: Any,
    optimizer: mx.optimizer.Optimizer,
    fp16: bool = False,
    groups: int = 1,
    shared_memory: bool = True,
) -> mx.gluon.Trainer:
    """Gluon's trainer, with gradients averaged over ranks by Horovod where there are several.

    Args:
        parameters: a ``ParameterDict``, the same on every rank.
        fp16: send gradients as float16. Pays only where the link is slower than the rounding.
        groups: gradients travel in that many fixed groups. The order of summation, and so every
            bit of the result, is then the same in every run; with 0 Horovod groups them by what
            happens to be ready, and three ranks or more differ in the last bits from run to run.
        shared_memory: where all ranks compute on the CPUs of one node, add gradients up in memory
            that they share instead (see shared_gradients.py). The first step moves them there, so
            a loop of one's own asks for ``parameter.grad()`` in each step anew.

    Raises:
        ValueError: gradients are sparse: Horovod's sums of them write beyond their memory.
    """
    hvd = _horovod()
    if hvd is None:
        import mxnet as mx

        return mx.gluon.Trainer(parameters, optimizer, kvstore=None)
    compression = hvd.Compression.fp16 if fp16 else hvd.Compression.none
    trainer = hvd.DistributedTrainer(
        parameters, optimizer, compression=compression, num_groups=groups
    )
    if trainer._contains_sparse_grad:
        raise ValueError(
            "gradients are sparse, which cannot be added up over ranks; set sparse_grad=False"
        )
    # A Horovod that averages in NCCL leaves no division by the number of ranks to the trainer.
    if shared_memory and not fp16 and trainer._average_in_framework:
        from .shared_gradients import SharedGradients

        trainer._allreduce_grads = SharedGradients(trainer)
    return trainer

"""The way of small sums over all ranks, in two levels.

The ranks of a node add up in the memory that they share (shared_memory.py), and the node's leader,
its first rank, does so with the leaders of the other nodes (channel.py). Where one of the two is
impossible, Horovod makes small sums.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import secrets
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from . import channel, environment, shared_memory
from .channel import Address, Channel, Listener
from .ranks import horovod, is_root, local_rank, local_size, rank, world_size

_CAPACITY = 2**15  # numbers per call; longer sums are made in chunks
_ODD = "hosts share a name, or rank 0 is not the first rank of its host"

Sum = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Nodes:
    """Where this rank is among several nodes."""

    index: int  # of its node
    count: int
    channel: Optional[Channel]  # on leaders

    def connect(
        self, capacity: int, stream: int, sum_over_ranks: Sum
    ) -> Optional[shared_memory.SharedMemorySum]:
        """Sums of up to ``capacity`` numbers over all ranks; None on all of them if it cannot be.

        Args:
            stream: a number of its own for each sum that may be under way at once.
            sum_over_ranks: another allreduce of float64 vectors over all ranks.
        """

        def sum_over_node(values: np.ndarray) -> np.ndarray:
            of_nodes = np.zeros((self.count, values.size))
            of_nodes[self.index] = values
            return sum_over_ranks(of_nodes.ravel()).reshape(of_nodes.shape)[self.index]

        beyond = shared_memory.Beyond(self.channel, stream)
        place = local_rank(), local_size()
        shared = shared_memory.connect(capacity, *place, sum_over_node, beyond=beyond)
        connected = sum_over_ranks(np.array([shared is not None], np.float64))[0]
        return shared if connected == world_size() else None


class _Hello(NamedTuple):
    """What a rank tells all others."""

    host: str
    local_rank: int
    local_size: int
    address: Address  # at which a leader listens
    token: str  # hexadecimal; rank 0's counts
    problem: Optional[str]


def _meet() -> Tuple[Optional[Nodes], str]:
    """Connect the leaders of the nodes; collective.

    Returns:
        the nodes, and otherwise None and why the leaders cannot be connected; alike on all ranks.
    """
    listener, problem = _listen() if local_rank() == 0 else (None, None)
    address = ("", 0) if listener is None else listener.address
    token = secrets.token_hex(channel.TOKEN_BYTES if rank() == 0 else 0)
    own = _Hello(environment.hostname(), local_rank(), local_size(), address, token, problem)
    told = [_Hello(*hello) for hello in gather(own, allreduce_by_horovod)]
    leaders = _leaders(told)
    problem = next((h.problem for h in told if h.problem), None if leaders else _ODD)
    index = [leader.host for leader in leaders].index(own.host) if leaders else 0
    opened = None
    if listener is not None:
        with contextlib.closing(listener):
            if problem is None:
                try:
                    shown = bytes.fromhex(told[0].token)
                    opened = listener.meet(index, [leader.address for leader in leaders], shown)
                except OSError as error:
                    problem = f"{environment.where()}: {error}"
    problem = next(filter(None, gather(problem, allreduce_by_horovod)), None)
    return (Nodes(index, len(leaders), opened), "") if problem is None else (None, problem)


def _listen() -> Tuple[Optional[Listener], Optional[str]]:
    """A leader's listener, or what keeps it from having one."""
    if channel.library() is None:
        return None, f"{environment.where()}: no C++"
    try:
        return Listener(channel.own_address()), None
    except OSError as error:
        return None, f"{environment.where()}: {error}"


def _leaders(told: Sequence[_Hello]) -> List[_Hello]:
    """One of each node, in rank order; none if the ranks' places do not fit together."""
    leaders = [hello for hello in told if hello.local_rank == 0]
    for leader in leaders:
        on_host = [hello for hello in told if hello.host == leader.host]
        if sorted(hello.local_rank for hello in on_host) != list(range(leader.local_size)):
            return []
    return leaders if told[0].local_rank == 0 else []


class _Way(NamedTuple):
    """The way of small sums, if it is not Horovod's."""

    nodes: Optional[Nodes]  # None on one node
    sums: Optional[shared_memory.SharedMemorySum]


@functools.lru_cache(maxsize=None)
def way() -> Optional[Future[_Way]]:
    """The way of small sums, in the making; None for a rank that is alone.

    A few of Horovod's cycles pass until it is there, in which the caller can work. No other
    collective runs meanwhile: they all wait for it.
    """
    if world_size() == 1:
        return None
    connector = ThreadPoolExecutor(1)
    found = connector.submit(_connect)
    connector.shutdown(wait=False)
    return found


def _connect() -> _Way:
    meet = functools.partial(allreduce_by_horovod, name="shared_memory")
    if local_size() == world_size():
        return _Way(None, shared_memory.connect(_CAPACITY, rank(), world_size(), meet))
    found, why_not = _meet()
    if found is None:
        if is_root():
            print(f"small sums go through Horovod, which is slower: {why_not}", file=sys.stderr)
        return _Way(None, None)
    return _Way(found, found.connect(_CAPACITY, 0, meet))


def small_sums() -> Optional[shared_memory.SharedMemorySum]:
    """What adds up small arrays; None where Horovod does; collective."""
    found = way()
    return None if found is None else found.result().sums


def sums_are_cheap() -> bool:
    """Whether :func:`allreduce_sum` takes microseconds, plus the wire's between nodes."""
    return small_sums() is not None


def ranks_share_memory() -> bool:
    """Whether all ranks share one node's memory."""
    sums = small_sums()
    return sums is not None and sums.beyond is None


def connect_sum(
    capacity: int, number: int, sum_over_ranks: Sum
) -> Optional[shared_memory.SharedMemorySum]:
    """Another sum over all ranks, which may be under way with others; None on all ranks if not.

    Args:
        capacity: the most numbers in a vector.
        number: its own, from 1, the same on every rank.
        sum_over_ranks: another allreduce of float64 vectors over all ranks.
    """
    found = way()
    if found is None:
        return None
    if local_size() == world_size():
        return shared_memory.connect(capacity, rank(), world_size(), sum_over_ranks)
    nodes = found.result().nodes
    return None if nodes is None else nodes.connect(capacity, number, sum_over_ranks)


def allreduce_by_horovod(values: np.ndarray, name: str) -> np.ndarray:
    """The sum over ranks of a host array, of any size; milliseconds; collective."""
    import mxnet as mx

    tensor = mx.nd.array(values, dtype=values.dtype)
    return horovod().allreduce(tensor, average=False, name=name).asnumpy()


def gather(value: Any, allreduce: Callable[[np.ndarray, str], np.ndarray]) -> List[Any]:
    """Every rank's ``value`` in rank order, by sums of int64; collective.

    It is sent as JSON, which runs nothing where it arrives, so it may hold what JSON knows, and
    arrays of numbers; tuples arrive as lists, the keys of dictionaries as texts.

    Raises:
        TypeError: it holds something else.
        ValueError: another rank has sent something else.
    """
    # Not horovod.allgather_object: it unpickles, and names tensors by type(value).
    told = json.dumps(value, default=_tagged).encode()
    # Eight bytes a number, as sums are of int64 anyway; JSON may end with blanks.
    words = np.frombuffer(told + b" " * (-len(told) % 8), np.int64)
    sizes = np.zeros(world_size(), np.int64)
    sizes[rank()] = words.size
    ends = np.cumsum(allreduce(sizes, "object.sizes"))
    together = np.zeros(ends[-1], np.int64)
    together[ends[rank()] - words.size : ends[rank()]] = words
    parts = np.split(allreduce(together, "object"), ends[:-1])
    return [json.loads(part.tobytes(), object_hook=_untagged) for part in parts]


_ARRAY = "\0array"


def _tagged(value: Any) -> Any:
    """An array, or a number of NumPy's, in what JSON knows."""
    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype.kind in "OV":
        raise TypeError(f"a {type(value).__name__} cannot be sent to other ranks")
    if isinstance(value, np.generic):
        return value.item()
    return {_ARRAY: [value.dtype.str, value.shape, base64.b64encode(value.tobytes()).decode()]}


def _untagged(values: Dict[str, Any]) -> Any:
    if values.keys() != {_ARRAY}:
        return values
    dtype, shape, content = values[_ARRAY]
    return np.frombuffer(base64.b64decode(content), dtype).reshape(shape).copy()

"""The nodes of a job: which rank is where, and sums over all ranks in two levels.

The ranks of a node add up in the memory that they share, and its leader, its first rank, does so
with the leaders of the other nodes.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from . import channel, environment, shared_memory
from .channel import Address, Channel, Listener
from .ranks import local_rank, local_size, rank, world_size

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
    token: bytes  # rank 0's counts
    problem: Optional[str]


def meet(gather: Callable[[Any], List[Any]]) -> Tuple[Optional[Nodes], str]:
    """Connect the leaders of the nodes; collective.

    Args:
        gather: gives every rank's object, in rank order.

    Returns:
        the nodes, and otherwise None and why the leaders cannot be connected; alike on all ranks.
    """
    listener, problem = _listen() if local_rank() == 0 else (None, None)
    address = ("", 0) if listener is None else listener.address
    token = secrets.token_bytes(channel.TOKEN_BYTES if rank() == 0 else 0)
    own = _Hello(environment.hostname(), local_rank(), local_size(), address, token, problem)
    told = gather(own)
    leaders = _leaders(told)
    problem = _first(hello.problem for hello in told) or (None if leaders else _ODD)
    index = [leader.host for leader in leaders].index(own.host) if leaders else 0
    opened = None
    if listener is not None:
        with contextlib.closing(listener):
            if problem is None:
                try:
                    opened = listener.meet(
                        index, [leader.address for leader in leaders], told[0].token
                    )
                except OSError as error:
                    problem = f"{environment.where()}: {error}"
    problem = _first(gather(problem))
    return (Nodes(index, len(leaders), opened), "") if problem is None else (None, problem)


_ODD = "hosts share a name, or rank 0 is not the first rank of its host"


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


def _first(problems: Any) -> Optional[str]:
    return next((problem for problem in problems if problem is not None), None)

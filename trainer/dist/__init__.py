"""Who the ranks are, and what they say to each other: ``dist.rank()``, ``dist.allreduce_sum(...)``.

The only room that imports horovod.
"""

from .collectives import (
    PeerError,
    allreduce_sum,
    allreduce_sum_,
    any_rank,
    barrier,
    broadcast_array,
    broadcast_object,
    broadcast_parameters,
    gather_objects,
    init,
    leaders_process_set,
    node_process_set,
    settle,
    shutdown,
    together,
)
from .environment import NotJoinedError
from .ranks import allow_timeline, is_root, local_rank, local_size, rank, timeline, world_size
from .small_sums import connect_sum, ranks_share_memory, sums_are_cheap

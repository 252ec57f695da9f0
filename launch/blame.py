"""Which rank to name when a job fails.

A rank that raises takes Horovod down while it unwinds, so its peers, which only lost a peer, often
end before it does. The first to end is not the cause then: what a rank last said tells.
"""

from __future__ import annotations

import re
from typing import Iterable, Optional, Sequence

# What Horovod 0.28 and Gloo say in a rank that lost a peer.
_LOST_PEER = re.compile(
    "Horovod has been shut down|Horovod background loop uncaught exception"
    "|Connection (closed|reset) by peer|caused pair closure|HTTP request failed"
)


def lost_a_peer(last_lines: Iterable[str]) -> bool:
    """Whether a rank that failed with these last lines did so because another one had."""
    return any(_LOST_PEER.search(line) for line in last_lines)


def first_cause(
    failed: Sequence[int], bereaved: Sequence[int], unresponsive: Sequence[int]
) -> Optional[int]:
    """The rank to name: of the `failed` ones (in order of their end) the first not `bereaved`.

    When all of them only lost a peer, it is the first `unresponsive` rank (alive, but it had to be
    killed), and failing that the first that ended. None when nothing failed.
    """
    causes = [rank for rank in failed if rank not in bereaved]
    candidates = [*causes, *unresponsive, *failed]
    return candidates[0] if candidates else None

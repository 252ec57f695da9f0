"""Which rank to name when a job fails.

A rank that raises takes Horovod down while it unwinds, so its peers, which only lost a peer, often
end before it does. The first to end is not the cause then: what a rank last said tells.
"""

from __future__ import annotations

import re
from typing import Optional, Sequence

# What Horovod 0.28 and Gloo say in a rank that lost a peer, and what a trainer makes of it.
_LOST_PEER = re.compile(
    "Horovod has been shut down|Horovod background loop uncaught exception"
    "|Connection (closed|reset) by peer|caused pair closure|HTTP request failed"
    "|gloo::IoException|another rank has ended"
    "|on this node (ended before its turn|has been stopped)"
)


def tells_no_cause(exited: bool, last_lines: Sequence[str]) -> bool:
    """Whether a failed rank leaves it to another one to tell why.

    Either it lost a peer, or it `exited` (no signal ended it) without a word, as the other ranks
    do where rank 0 speaks for all.
    """
    return (exited and not last_lines) or any(_LOST_PEER.search(line) for line in last_lines)


def first_cause(
    failed: Sequence[int], without_cause: Sequence[int], unresponsive: Sequence[int]
) -> Optional[int]:
    """The rank to name: the first of the `failed` ones (in order of their end) that tells a cause.

    When all are `without_cause` (`tells_no_cause`), it is the first `unresponsive` rank (alive,
    but it had to be killed), and failing that the first that ended. None when nothing failed.
    """
    causes = [rank for rank in failed if rank not in without_cause]
    candidates = [*causes, *unresponsive, *failed]
    return candidates[0] if candidates else None

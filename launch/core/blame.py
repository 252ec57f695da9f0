"""Finds the rank that caused a job to fail.

A rank that raises shuts Horovod down while it unwinds, so its peers often exit before it does. The
first to exit is therefore not always the cause; the last output of the ranks tells them apart.
"""

from __future__ import annotations

import re
from typing import Optional, Sequence

# Messages of Horovod 0.28, Gloo and trainer/ in a rank that lost a peer.
_LOST_PEER = re.compile(
    "Horovod has been shut down|Horovod background loop uncaught exception"
    "|Connection (closed|reset) by peer|caused pair closure|HTTP request failed"
    "|gloo::IoException|another rank has ended"
    "|on this node (ended before its turn|has been stopped)"
    r"|lost node \d+ of \d+: |this node's first rank lost another"
)


def lacks_cause(exited: bool, last_lines: Sequence[str]) -> bool:
    """Whether a failed rank's output does not show why the job failed.

    Either it lost a peer, or it `exited` (was not killed by a signal) without output, as ranks do
    where rank 0 prints for all.
    """
    return (exited and not last_lines) or any(_LOST_PEER.search(line) for line in last_lines)


def first_cause(
    failed: Sequence[int], without_cause: Sequence[int], unresponsive: Sequence[int]
) -> Optional[int]:
    """The rank to blame: the first of `failed` (in order of exit) whose output shows a cause.

    If all are `without_cause` (see `lacks_cause`), it is the first `unresponsive` rank (alive,
    but it had to be killed), and failing that the first that exited. None if nothing failed.
    """
    causes = [rank for rank in failed if rank not in without_cause]
    candidates = [*causes, *unresponsive, *failed]
    return candidates[0] if candidates else None

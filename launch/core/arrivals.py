"""Which ranks have arrived at the rendezvous store, which are late and which will never come."""

from __future__ import annotations

import threading
import time
from typing import Dict, Iterable, List, Set

CHECK_IN = "check_in"  # scope of launch's own check-in, before the command starts
HELD_KEYS = {CHECK_IN: "{rank}", "global": "rank_{rank}"}
"""Scope -> the key whose PUT is answered only when every rank has sent its own. Gloo's first PUT
in `hvd.init()` is `global/rank_<n>`, and its timeout starts after the answer: while a rank is
late, the others wait here instead of running into HOROVOD_GLOO_TIMEOUT_SECONDS."""

SECONDS_TO_ANSWER = 5.0  # what rank 0 waits at most for the answers to the others

ENDED_BEFORE_INIT = "ended before hvd.init(), where others wait for it"


class MissingRanksError(Exception):
    """Some ranks did not arrive in time, or have ended; the message names them."""


class Arrivals:
    """Tracks which ranks have arrived in each held scope, and lets them wait for the rest."""

    def __init__(self, world_size: int, timeout: float) -> None:
        self._world_size = world_size
        self._timeout = timeout
        self._since: Dict[str, float] = {}  # when the first rank arrived
        self._arrived: Dict[str, Set[int]] = {scope: set() for scope in HELD_KEYS}
        self._completed: Dict[str, float] = {}
        self._ended: Set[int] = set()
        self._answered: Set[str] = set()  # paths of requests
        self._closed = False
        self._changed = threading.Condition()

    def missing(self, scope: str) -> List[int]:
        return sorted(set(range(self._world_size)) - self._arrived[scope])

    def overdue(self, scope: str, seconds: float) -> bool:
        """Whether the first to arrive in `scope` has waited for others for so many seconds."""
        with self._changed:
            some = 0 < len(self._arrived[scope]) < self._world_size
            return some and time.monotonic() > self._since[scope] + seconds

    def awaited(self, rank: int) -> bool:
        """Whether other ranks wait in `hvd.init()` for this one."""
        with self._changed:
            return bool(self._arrived["global"]) and rank in self.missing("global")

    def end(self, rank: int) -> None:
        """Records that the rank's process has ended, and releases those that wait for it."""
        with self._changed:
            self._ended.add(rank)
            self._changed.notify_all()

    def absent(self) -> str:
        """Names the ranks that have ended though others wait for them in `hvd.init()`, else ""."""
        with self._changed:
            ranks = sorted(rank for rank in self._ended if self.awaited(rank))
        return f"{ranks_text(ranks)} {ENDED_BEFORE_INIT}" if ranks else ""

    def seconds_since_complete(self, scope: str) -> float:
        """Seconds since the last rank arrived; 0 while some are missing."""
        return time.monotonic() - self._completed.get(scope, time.monotonic())

    def close(self) -> None:
        """Releases the waiting ranks: the job is over."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def arrive_and_wait(self, scope: str, rank: int) -> None:
        """Records that `rank` has arrived; returns when all have, or raises MissingRanksError.

        The timeout counts from the first arrival: what all ranks do before it may take longer.
        """
        with self._changed:
            self._arrived[scope].add(rank)
            since = self._since.setdefault(scope, time.monotonic())
            if not self.missing(scope):
                self._completed.setdefault(scope, time.monotonic())
            self._changed.notify_all()
            remaining = max(0.0, since + self._timeout - time.monotonic())
            self._changed.wait_for(
                lambda: self._closed or not self.missing(scope) or self.absent(), remaining
            )
            if self.missing(scope):
                raise MissingRanksError(self.absent() or self.explain(scope, self._timeout))

    def answered(self, path: str) -> None:
        """Records that who arrived by a request of this path has been answered, or has gone."""
        with self._changed:
            self._answered.add(path)
            self._changed.notify_all()

    def wait_for_answers(self, scope: str) -> None:
        """Returns when all others that have arrived have been answered."""
        with self._changed:
            others = {f"/{scope}/{rank}" for rank in self._arrived[scope] - {0}}
            self._changed.wait_for(lambda: self._answered >= others, SECONDS_TO_ANSWER)

    def explain(self, scope: str, seconds: float) -> str:
        """Which ranks have not arrived after so many seconds."""
        done = "checked in" if scope == CHECK_IN else "called hvd.init()"
        missing = self.missing(scope)
        return (
            f"{self._world_size - len(missing)} of {self._world_size} ranks {done} within "
            f"{seconds:g} s; missing: {ranks_text(missing)}"
        )


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 1, 2, 5`, or the first eight of them and how many more."""
    numbers = list(ranks)
    shown = ", ".join(str(r) for r in numbers[:8])
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}{more}"

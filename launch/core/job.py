"""Supervises the ranks of one start until all have ended, and finds which failed and why."""

from __future__ import annotations

import os
import queue
import signal
import time
from types import FrameType
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple, Union

from .arrivals import ranks_text
from .process import Failure, describe_exit, first_cause, say, shell_exit_code
from .rank_process import RankProcess
from .ranks import EXIT_SAVED, count_of

SETTLE_SECONDS = 3.0
"""Time for the rank at fault to exit, if the first to fail shows no cause, before all are ended."""
TICK_SECONDS = 0.2
"""Signal handlers run between two waits, so a signal may be seen this much later."""
FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


class Events(queue.SimpleQueue):
    """The queue that a job waits on: ranks that have ended, and signals to the launcher."""

    def on_signal(self, signum: int, frame: Optional[FrameType]) -> None:
        self.put(signal.SIGTERM if signum == signal.SIGHUP else signum)


class Outcome(NamedTuple):
    """How the ranks of one start ended."""

    exit_code: int  # as a shell would have it: 128 + n for signal n
    failure: Optional[Failure] = None
    terminated: bool = False  # by ctrl-C or a signal to the launcher
    outdated: bool = False  # ended because the number of ranks should change
    unconnected: bool = False  # a rank that failed could not connect to one that was there


class Job:
    """Supervises ranks, which the caller adds to `ranks`.

    When one fails, the others get SIGTERM, and SIGKILL `kill_after` seconds later. A rank that is
    stopped (SIGSTOP) for longer than its peers wait for it gets SIGKILL. When `outdated()` is true,
    all ranks are ended in the same way.
    """

    def __init__(
        self, events: Events, kill_after: float, outdated: Callable[[], bool] = lambda: False
    ) -> None:
        self.ranks: List[RankProcess] = []
        self._events = events
        self._kill_after = kill_after
        self._outdated = outdated
        # How long ranks wait for a peer that fell silent, in seconds.
        self._stop_limit = float(count_of(os.environ, "HOROVOD_GLOO_TIMEOUT_SECONDS", 30))
        self._failed: List[RankProcess] = []  # in the order of their ends
        self._causes: Dict[RankProcess, str] = {}  # where the exit code does not tell
        self._unresponsive: List[RankProcess] = []
        self._stopped_since: Dict[RankProcess, float] = {}
        self._ending = False
        self._resizing = False
        self._interrupted = False
        self._warned = False
        self._timer: Optional[Tuple[float, Callable[[], None]]] = None

    def supervise(self, awaited: Callable[[int], bool] = lambda rank: False) -> Outcome:
        """Waits until all ranks have ended; returns how.

        A rank that has ended fails, whatever its exit code, if `awaited(rank)` tells that others
        wait for it in `hvd.init()`.
        """
        for rank in self.ranks:
            rank.watch(self._events, self._kill_after)
        running = len(self.ranks)
        while running:
            try:
                event: Union[RankProcess, int] = self._events.get(timeout=TICK_SECONDS)
            except queue.Empty:
                self._find_absent(awaited)
                self._tick()
                continue
            if isinstance(event, RankProcess):
                running -= 1
                self._ended(event)
            else:
                self._signalled(event)
        return self._outcome()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.signal(signal.SIGKILL)

    def _tick(self) -> None:
        self._kill_stopped()
        if self._timer and time.monotonic() >= self._timer[0]:
            action, self._timer = self._timer[1], None
            action()
        if not (self._ending or self._failed or self._warned) and self._outdated():
            self._resizing = True
            self._terminate()

    def _kill_stopped(self) -> None:
        """Kills ranks stopped for too long: they ignore SIGTERM, and a lone one has no peers."""
        now, before = time.monotonic(), self._stopped_since
        self._stopped_since = {r: before.get(r, now) for r in self._running() if r.is_stopped()}
        for rank, since in self._stopped_since.items():
            if now - since > self._stop_limit:
                self._causes[rank] = f"stood stopped (SIGSTOP) for {self._stop_limit:g} s: SIGKILL"
                rank.signal(signal.SIGKILL)

    def _find_absent(self, awaited: Callable[[int], bool]) -> None:
        if self._ending or self._failed:
            return
        for rank in self.ranks:
            if rank.process.returncode in (0, EXIT_SAVED) and awaited(rank.rank):
                how = describe_exit(rank.process.returncode)
                self._causes[rank] = f"{how} before hvd.init(), where others wait"
                self._failed.append(rank)
        if self._failed:
            self._terminate()

    def _running(self) -> List[RankProcess]:
        return [rank for rank in self.ranks if not rank.ended]

    def _ended(self, rank: RankProcess) -> None:
        """Records a failure, and ends the other ranks once the cause is known."""
        if rank.process.returncode in (0, EXIT_SAVED) or self._ending:
            return
        self._failed.append(rank)
        if not rank.lacks_cause():
            self._terminate()
        elif len(self._failed) == 1:
            self._timer = (time.monotonic() + SETTLE_SECONDS, self._terminate)

    def _signalled(self, signum: int) -> None:
        if signum != signal.SIGINT:
            self._warned = True
            for rank in self.ranks:
                rank.signal(signum)
        elif self._interrupted:
            self._kill_the_rest()
        else:
            self._interrupted = True
            say(
                f"interrupted; the ranks have {self._kill_after:g} s to save and end "
                "(ctrl-C again kills them now)"
            )
            self._terminate()

    def _terminate(self) -> None:
        self._ending = True
        for rank in self.ranks:
            rank.signal(signal.SIGTERM)
        self._timer = (time.monotonic() + self._kill_after, self._kill_the_rest)

    def _kill_the_rest(self) -> None:
        late = self._running()
        if late and not self._failed:  # a failure's report says it
            say(
                f"{ranks_text(rank.rank for rank in late)} had not ended and got SIGKILL: what "
                "was not saved by then is lost (--kill-after gives ranks longer)"
            )
        for rank in late:
            silent = f"answered neither its peers nor SIGTERM for {self._kill_after:g} s: SIGKILL"
            self._causes.setdefault(rank, silent)
        self._unresponsive += late
        self.kill()

    def _outcome(self) -> Outcome:
        terminated = self._interrupted or self._warned
        if self._interrupted:
            return Outcome(128 + signal.SIGINT, terminated=terminated)
        unresponsive = self._unresponsive if self._failed else []
        # Rank 0's output is not known where it has the terminal (--quiet), its peers' is.
        failed = sorted(self._failed, key=lambda rank: rank.lost_a_peer)
        rank = first_cause(failed, RankProcess.lacks_cause, unresponsive)
        if rank is None:
            code = max(shell_exit_code(rank.process.returncode) for rank in self.ranks)
            return Outcome(code, terminated=terminated, outdated=self._resizing)
        code = shell_exit_code(rank.process.returncode) or 1  # an absent rank may end with 0
        unconnected = any(failed.found_no_peer() for failed in self._failed)
        cause = self._causes.get(rank) or describe_exit(rank.process.returncode)
        failure = Failure(rank.rank, cause, rank.last_lines())
        return Outcome(code, failure, terminated, unconnected=unconnected)

"""Restart policy of a job that has lost a rank: whether it restarts, and on which slots.

As in torchrun, all ranks are ended and the same command is started again, so that a job always
consists of fresh processes. The command must resume from what it has saved. Nothing here knows how
ranks are started.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import List, Optional

from ..core.job import Events, Outcome, report_failure
from ..core.process import say
from .discovery import Discovery

EXIT_USAGE = 2
"""Exit code of a command that was given bad input, and would fail again."""

ANSWER_SECONDS = 0.05
"""Poll interval while the job waits for an answer of --discover."""

Slots = List[int]
"""A slot, numbered from 0, is room for one rank: a GPU, where there are any."""


class TerminatedError(Exception):
    """The launcher received a signal before the ranks were started."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name} before ranks were started")
        self.exit_code = 128 + signum


@dataclass
class Elastic:
    """Decides on which slots a job runs, at first and after each restart.

    If `min_ranks` is None, a lost rank is replaced. Otherwise its slot is given up, and the job
    continues while at least that many are left. With a `discovery` the job takes as many slots as
    it finds, up to `max_ranks`; it waits up to `patience` seconds for enough of them: `ranks` at
    first, `min_ranks` later.
    """

    ranks: int
    min_ranks: Optional[int] = None
    max_ranks: Optional[int] = None
    max_restarts: int = 0
    discovery: Optional[Discovery] = None
    patience: float = 0.0

    def __post_init__(self) -> None:
        least = self.min_ranks or 1
        most = self.max_ranks or (sys.maxsize if self.discovery else self.ranks)
        if not least <= self.ranks <= most:
            raise ValueError(
                f"{self.ranks} ranks are not between --min-ranks {least} and --max-ranks {most}"
            )
        if most > self.ranks and self.discovery is None:
            raise ValueError(
                f"--max-ranks {most} is above -n {self.ranks}, and nothing reports when there is "
                "room for more ranks: add --discover COMMAND, or leave out -n"
            )
        self._least, self._most, self._restarts = least, most, 0
        self._wanted = self.ranks  # of the last answer

    def first_slots(self, events: Events) -> Slots:
        """The slots of the first start; raises ValueError if there are not enough.

        Raises TerminatedError if a signal arrives first.
        """
        self._slots = list(range(self.ranks))
        if self.discovery:
            self._slots = self._discovered(self.discovery, self.ranks, events)
        if len(self._slots) < self.ranks:
            raise ValueError(f"--discover found {len(self._slots)} slots; {self.ranks} are needed")
        return self._slots

    def close(self) -> None:
        """Ends the discovery command if it is running."""
        if self.discovery:
            self.discovery.close()

    def outdated(self) -> bool:
        """Whether the job should now run on another number of slots. Never waits.

        One answer is not enough: with a number that flaps, the job would keep restarting.
        """
        found = self.discovery.poll() if self.discovery else None
        if found is None:
            return False
        before, self._wanted = self._wanted, min(found, self._most)
        return before == self._wanted != len(self._slots)

    def next_slots(self, outcome: Outcome, events: Events) -> Slots:
        """The slots of the next start, none if the job is over; reports which in one line."""
        if outcome.exit_code == 0 or outcome.terminated:
            return []
        if self.max_restarts == 0 and not outcome.outdated:
            return []
        why_not = self._why_not(outcome)
        if why_not is None:
            try:
                self._slots = self._slots_after(outcome, events)
            except TerminatedError as error:
                say(str(error))
                return []
            if len(self._slots) < self._least:
                why_not = f"slots left: {len(self._slots)}, --min-ranks is {self._least}"
        if why_not is not None:
            say(f"not started again: {why_not}")
            return []
        self._report_restart(outcome)
        return self._slots

    def _why_not(self, outcome: Outcome) -> Optional[str]:
        if outcome.exit_code == EXIT_USAGE:
            return f"exit code {EXIT_USAGE} means bad input"
        if self._restarts == self.max_restarts and not outcome.outdated:
            return f"it was {self._restarts} times already (--max-restarts)"
        return None

    def _report_restart(self, outcome: Outcome) -> None:
        number = len(self._slots)
        then = f"continuing with {number} rank{'s' if number > 1 else ''}"
        if outcome.outdated:
            say(f"the number of slots has changed; {then}")
            return
        self._restarts += 1
        then += f" (restart {self._restarts} of {self.max_restarts})"
        if outcome.failure:
            report_failure(outcome.failure, then)
        else:
            say(f"the ranks saved and ask to be run again; {then}")

    def _slots_after(self, outcome: Outcome, events: Events) -> Slots:
        if self.discovery:
            return self._discovered(self.discovery, self._least, events)
        if self.min_ranks is None or outcome.failure is None:
            return self._slots
        lost = outcome.failure.rank
        return [slot for rank, slot in enumerate(self._slots) if rank != lost]

    def _discovered(self, discovery: Discovery, needed: int, events: Events) -> Slots:
        """Waits for an answer with `needed` slots; returns fewer after `patience` seconds."""
        deadline = time.monotonic() + self.patience
        found: Optional[int] = None
        discovery.ask()
        while found is None or (found < needed and time.monotonic() < deadline):
            with suppress(queue.Empty):
                raise TerminatedError(events.get(timeout=ANSWER_SECONDS))
            answer = discovery.poll()
            found = found if answer is None else answer
        return list(range(min(found, self._most)))


def visible_devices(slots: Slots) -> Optional[str]:
    """CUDA_VISIBLE_DEVICES for a job on `slots`, so that a lost GPU is not used again.

    None if no slot was lost: then the user's value stays.
    """
    if slots == list(range(len(slots))):
        return None
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(slot) for slot in range(max(slots) + 1)]
    return ",".join(devices[slot] for slot in slots if slot < len(devices))

"""Restart policy of a job that has lost a rank: whether it restarts, and on which slots.

As in torchrun, all ranks are ended and the same command is started again, so that a job always
consists of fresh processes. The command must resume from what it has saved. Nothing here knows how
ranks are started.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import List, Optional

from ..core.job import Events, Outcome
from ..core.process import RECONNECT, report_failure, say
from ..core.streams import USER_ERROR

ANSWER_SECONDS = 0.05
"""Poll interval while the job waits for an answer of --discover."""

LONGEST_PAUSE = 60.0
"""Seconds before a restart: none before the first, 1 before the second, then twice as many. Ranks
that have run for longer than this have overcome what ended those before."""

TIMEOUT_SECONDS = 60
"""How long a call of --discover's command may take."""

Slots = List[int]
"""A slot, numbered from 0, is room for one rank: a GPU, where there are any."""


class Discovery:
    """The number of slots that a shell command prints; it is run every `every` seconds."""

    def __init__(self, command: str, every: float) -> None:
        self.every = every
        self._command = command
        self._found: Optional[int] = None
        self._complaint = ""
        self._started = 0.0
        self._running: Optional[subprocess.Popen[bytes]] = None

    def ask(self) -> None:
        """Starts the command unless it is running; `poll` returns its answer."""
        if self._running is None:
            self._started = time.monotonic()
            self._running = subprocess.Popen(
                ["sh", "-c", self._command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                start_new_session=True,  # so that `close` reaches the command's children too
            )

    def poll(self) -> Optional[int]:
        """The number of slots if an answer has just arrived, else None; never waits.

        If the command fails, that is reported once and the previous number stays. Raises ValueError
        if there is no previous number.
        """
        if time.monotonic() - self._started > self.every:
            self.ask()
        process, late = self._running, time.monotonic() - self._started > TIMEOUT_SECONDS
        if process is None or (process.poll() is None and not late):
            return None
        self.close()
        try:
            self._found, self._complaint = self._number(process), ""
        except ValueError as error:
            if self._found is None:
                raise
            if self._complaint != str(error):
                say(f"{error}; it stays at {self._found}")
            self._complaint = str(error)
        return self._found

    def close(self) -> None:
        """Ends the command if it is running."""
        if self._running is not None and self._running.poll() is None:
            os.killpg(self._running.pid, signal.SIGKILL)
            self._running.wait()
        self._running = None

    def _number(self, process: subprocess.Popen[bytes]) -> int:
        """Parses what the finished command has printed."""
        assert process.stdout is not None
        with process.stdout as stdout:
            os.set_blocking(stdout.fileno(), False)  # a process it left running may hold the pipe
            out = (stdout.read() or b"").decode(errors="replace").strip()
        if process.returncode or not re.fullmatch("[0-9]{1,4}", out):
            raise ValueError(
                f"--discover {self._command!r} printed {out[:60]!r} and ended with exit code "
                f"{process.returncode} (-9: not within {TIMEOUT_SECONDS} s); it must print the "
                "number of ranks that can run now, and end with 0"
            )
        return int(out)


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
        self._pause, self._started, self._reconnected = 0.0, time.monotonic(), False

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
        """The slots of the next start, none if the job is over; reports which in one line.

        Raises TerminatedError if a signal arrives meanwhile.
        """
        if outcome.exit_code == 0 or outcome.terminated:
            return []
        if outcome.unconnected and not self._reconnected:
            self._reconnected = True
            say(RECONNECT)
            return self._slots
        if self.max_restarts == 0 and not outcome.outdated:
            return []
        if outcome.exit_code == USER_ERROR:  # it would fail again
            return self._over(f"exit code {USER_ERROR} means bad input")
        if self._restarts == self.max_restarts and not outcome.outdated:
            return self._over(f"it was {self._restarts} times already (--max-restarts)")
        if self.discovery:
            self._slots = self._discovered(self.discovery, self._least, events)
        elif self.min_ranks and outcome.failure:
            lost = outcome.failure.rank
            self._slots = [*self._slots[:lost], *self._slots[lost + 1 :]]
        if len(self._slots) < self._least:
            return self._over(f"slots left: {len(self._slots)}, --min-ranks is {self._least}")
        if time.monotonic() - self._started > LONGEST_PAUSE:
            self._pause = 0.0
        self._report_restart(outcome)
        if outcome.failure and not outcome.outdated:
            with suppress(queue.Empty):
                raise TerminatedError(events.get(timeout=self._pause))
            self._pause = min(max(1.0, 2 * self._pause), LONGEST_PAUSE)
        self._started = time.monotonic()
        return self._slots

    def _over(self, reason: str) -> Slots:
        say(f"not started again: {reason}")
        return []

    def _report_restart(self, outcome: Outcome) -> None:
        number = len(self._slots)
        then = f"continuing with {number} rank{'s' if number > 1 else ''}"
        if outcome.outdated:
            say(f"the number of slots has changed; {then}")
            return
        self._restarts += 1
        then += f" (restart {self._restarts} of {self.max_restarts})"
        if outcome.failure:
            pause = f" in {self._pause:g} s" if self._pause else ""
            report_failure(outcome.failure, f"; {then}{pause}")
        else:
            say(f"the ranks saved and ask to be run again; {then}")

    def _discovered(self, discovery: Discovery, needed: int, events: Events) -> Slots:
        """Waits for an answer with `needed` slots; returns fewer after `patience` seconds."""
        deadline = time.monotonic() + self.patience
        found: Optional[int] = None
        discovery.ask()
        while found is None or (found < needed and time.monotonic() < deadline):
            with suppress(queue.Empty):
                raise TerminatedError(events.get(timeout=ANSWER_SECONDS))
            answer = discovery.poll()
            if found is None and answer is not None and answer < needed:
                few = f"--discover found {answer} slots; {needed} are needed"
                say(f"{few}: waiting for up to {self.patience:g} s")
            found = found if answer is None else answer
        return list(range(min(found, self._most)))


def visible_devices(slots: Slots) -> Optional[str]:
    """CUDA_VISIBLE_DEVICES for a job on `slots`, so that a lost GPU is not used again.

    None if no slot was lost, or the user's value has none for each (all are hidden, or ranks share
    one): then it stays.
    """
    everyone = [str(slot) for slot in range(max(slots) + 1)]
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(everyone)).split(",")
    if len(slots) == len(everyone) or len(devices) < len(everyone):
        return None
    return ",".join(devices[slot] for slot in slots)

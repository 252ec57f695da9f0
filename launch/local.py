"""The ranks of this machine: start them, show what they say, end them together.

The store they meet in and their variables are horovodrun's (launch/rendezvous.py); the supervision
is our own, because horovodrun mixes the lines of all ranks, does not repeat the cause of a failure
and gives ranks five fixed seconds to save.
"""

from __future__ import annotations

import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from types import FrameType
from typing import IO, Callable, Deque, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from launch.blame import first_cause, tells_no_cause
from launch.hostname import address_of_own_name, take_hostname
from launch.network import check_interface, interface_of
from launch.process import describe_exit, die_with_parent, say, shell_exit_code
from launch.ranks import EXIT_SAVED, cores_per_rank, facts_on_one_host, rank_environment
from launch.rendezvous import START_TIMEOUT_SECONDS, Rendezvous

LOOPBACK = "127.0.0.1"
KILL_AFTER_SECONDS = 10.0
SETTLE_SECONDS = 3.0
"""When the first rank to fail tells no cause: time for the one that does, before all are ended."""
SIGNAL_CHECK_SECONDS = 0.2
"""Python's handlers run between two waits: a signal that comes just before one is seen after it."""
TAIL_LINES = 20
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1)

_terminal = threading.Lock()


class Failure(NamedTuple):
    """Why a job failed: the rank that was the cause, how it ended, and what it last said."""

    rank: int
    cause: str
    last_lines: List[str]


def tell(failure: Failure) -> None:
    """Repeats what the rank last said, so that nobody has to scroll for it."""
    if failure.last_lines:
        say(f"last lines of rank {failure.rank}, which failed:")
        for line in failure.last_lines:
            print(f"    {line}", file=sys.stderr)
    say(f"rank {failure.rank} {failure.cause}; all other ranks have been ended")


def run_local(
    command: Sequence[str],
    world_size: int,
    quiet: bool = False,
    kill_after: float = KILL_AFTER_SECONDS,
    start_timeout: float = START_TIMEOUT_SECONDS,
    on_failure: Callable[[Failure], None] = tell,
) -> int:
    """Runs `command` as `world_size` ranks on this machine and returns the job's exit code.

    That is 0, the first failing rank's, 85 when ranks were warned and saved, or 130 after ctrl-C.
    When a rank fails the others get SIGTERM, and SIGKILL `kill_after` seconds later. SIGTERM and
    SIGUSR1 are passed on to all ranks. With `quiet` rank 0 has the terminal for itself; otherwise
    each line is prefixed with its rank. `on_failure` is told of a failure when all have ended.
    """
    rendezvous = Rendezvous(
        LOOPBACK, world_size, secrets.token_hex(16), say, start_timeout=start_timeout
    )
    interface = os.environ.get("HOROVOD_GLOO_IFACE")
    interface = check_interface(interface) if interface else interface_of(LOOPBACK)
    prepare = die_with_parent if address_of_own_name() else _prepare_without_name
    job = _Job(kill_after, on_failure)
    previous = {s: signal.signal(s, job.on_signal) for s in (signal.SIGINT, *_FORWARDED)}
    try:
        for rank in range(world_size):
            environment = rank_environment(
                facts_on_one_host(rank, world_size),
                rendezvous.endpoint.environment(),
                interface,
                cores_per_rank(world_size),
            )
            inherit = quiet and rank == 0
            job.ranks.append(_Rank(rank, command, environment, prepare, inherit, not quiet))
        # Threads start only now: a fork of a process with threads may deadlock.
        rendezvous.serve_in_thread()
        return job.supervise()
    except subprocess.SubprocessError:  # what Popen makes of an error in `prepare`
        raise ValueError(
            f"this host's own name, {socket.gethostname()}, does not resolve, and Horovod goes by "
            f"it; add a line `127.0.1.1 {socket.gethostname()}` to /etc/hosts"
        ) from None
    finally:
        job.kill()
        rendezvous.close()
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _prepare_without_name() -> None:
    """Where the host's own name does not resolve, Horovod would crash (launch/hostname.py)."""
    die_with_parent()
    take_hostname(LOOPBACK)


class _Rank:
    """One rank's process, with the last lines it said."""

    def __init__(
        self,
        rank: int,
        command: Sequence[str],
        env: Dict[str, str],
        prepare: Callable[[], None],
        inherit: bool,
        show: bool,
    ) -> None:
        pipe = None if inherit else subprocess.PIPE
        self.rank = rank
        self._tail: Deque[bytes] = deque(maxlen=TAIL_LINES)
        self._prefix = f"[{rank}] ".encode() if show else None
        self.process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,  # so that signals reach the rank's own children too
            preexec_fn=prepare,
        )

    def watch(self, events: queue.SimpleQueue[_Event]) -> None:
        """Starts the threads that drain the rank's output and report its end."""
        streams = [(self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr)]
        drains = [
            threading.Thread(target=self._drain, args=(source, target.buffer), daemon=True)
            for source, target in streams
            if source is not None
        ]

        def wait() -> None:
            self.process.wait()
            for thread in drains:
                thread.join(timeout=1.0)  # a grandchild may hold the pipe open
            events.put(self)

        for thread in [*drains, threading.Thread(target=wait, daemon=True)]:
            thread.start()

    def last_lines(self) -> List[str]:
        return [line.decode(errors="replace").rstrip("\n") for line in self._tail]

    def tells_no_cause(self) -> bool:
        return tells_no_cause(self.process.returncode > 0, self.last_lines())

    def signal(self, signum: int) -> None:
        """Sends a signal to the rank and to the processes it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def _drain(self, source: IO[bytes], target: IO[bytes]) -> None:
        for line in source:
            self._tail.append(line)
            if self._prefix is None:
                continue
            # A reader that went away (`| head`) or a full disk must not stop the ranks.
            with _terminal, suppress(OSError, ValueError):
                target.write(self._prefix + line.rstrip(b"\n") + b"\n")
                target.flush()


_Event = Union[_Rank, int]  # a rank that has ended, or a signal number


class _Job:
    """All ranks, from their start to the exit code."""

    def __init__(self, kill_after: float, on_failure: Callable[[Failure], None]) -> None:
        self.ranks: List[_Rank] = []
        self._kill_after = kill_after
        self._on_failure = on_failure
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._failed: List[_Rank] = []  # in the order of their ends
        self._unresponsive: List[_Rank] = []
        self._ending = False
        self._interrupted = False
        self._timer: Optional[Tuple[float, Callable[[], None]]] = None

    def on_signal(self, signum: int, frame: Optional[FrameType]) -> None:
        self._events.put(signum)

    def supervise(self) -> int:
        """Waits until all ranks have ended; the job's exit code."""
        for rank in self.ranks:
            rank.watch(self._events)
        running = len(self.ranks)
        while running:
            try:
                event = self._events.get(timeout=SIGNAL_CHECK_SECONDS)
            except queue.Empty:
                self._run_timer_if_due()
                continue
            if isinstance(event, _Rank):
                running -= 1
                self._ended(event)
            else:
                self._signalled(event)
        return self._exit_code()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.signal(signal.SIGKILL)

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._timer = (time.monotonic() + seconds, action)

    def _run_timer_if_due(self) -> None:
        if self._timer and time.monotonic() >= self._timer[0]:
            action, self._timer = self._timer[1], None
            action()

    def _ended(self, rank: _Rank) -> None:
        """Notes a failure and ends the others, once it is known which rank was the cause."""
        if rank.process.returncode in (0, EXIT_SAVED) or self._ending:
            return
        self._failed.append(rank)
        if not rank.tells_no_cause():
            self._terminate()
        elif len(self._failed) == 1:
            self._after(SETTLE_SECONDS, self._terminate)

    def _signalled(self, signum: int) -> None:
        if signum != signal.SIGINT:
            for rank in self.ranks:
                rank.signal(signum)
        elif self._interrupted:
            self.kill()
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
        self._after(self._kill_after, self._kill_the_rest)

    def _kill_the_rest(self) -> None:
        self._unresponsive = [rank for rank in self.ranks if rank.process.poll() is None]
        self.kill()

    def _exit_code(self) -> int:
        if self._interrupted:
            return 128 + signal.SIGINT
        cause = self._first_cause()
        if cause is None:
            return max(rank.process.returncode for rank in self.ranks)
        self._on_failure(self._failure(cause))
        return shell_exit_code(cause.process.returncode)

    def _first_cause(self) -> Optional[_Rank]:
        without_cause = [rank.rank for rank in self._failed if rank.tells_no_cause()]
        number = first_cause(
            [rank.rank for rank in self._failed],
            without_cause,
            [rank.rank for rank in self._unresponsive] if self._failed else [],
        )
        return None if number is None else self.ranks[number]

    def _failure(self, rank: _Rank) -> Failure:
        if rank in self._unresponsive:
            cause = f"answered neither its peers nor SIGTERM for {self._kill_after:g} s: SIGKILL"
        else:
            cause = describe_exit(rank.process.returncode)
        return Failure(rank.rank, cause, rank.last_lines())

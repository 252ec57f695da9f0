"""Processes that several launchers start: how they ended, and which of them is to blame.

A rank that raises shuts Horovod down while it unwinds, so its peers often exit before it does. The
first to exit is therefore not always the cause; the last output of the ranks tells them apart.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO, Callable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, TypeVar

from .ranks import EXIT_SAVED
from .streams import print_line

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_libc = ctypes.CDLL(None, use_errno=True)
_noting = threading.Lock()
T = TypeVar("T")  # a rank: its number, or its process

TAIL_LINES = 20  # of a rank's output, which are shown once more if it fails
MAX_LINE = 2**16
"""Bytes after which a line is broken, so that output without newlines does not fill the memory."""
LINE = re.compile(rb"(?<=\n)")
LINE_OR_BAR = re.compile(rb"(?<=\n)|(?<=\r)(?=[^\n])")
"""Where lines end; in the second, those of a progress bar too, each of which overwrites the last.
"""

# Messages of Horovod 0.28, Gloo and trainer/ in a rank that lost a peer.
_LOST_PEER = re.compile(
    "Horovod has been shut down|Horovod background loop uncaught exception"
    "|Connection (closed|reset) by peer|caused pair closure|HTTP request failed"
    "|gloo::IoException|another rank has ended"
    "|on this node (ended before its turn|has been stopped)"
    r"|lost node \d+ of \d+: |this node's first rank lost another"
)
# Of Gloo, in hvd.init(); each port takes one connection, be it a stranger's.
_NOT_CONNECTED = re.compile(r"connect \[.*\]:\d+: Connection refused")


def say(message: str) -> None:
    """Prints a message of the launcher to stderr; dropped if the terminal was closed."""
    print_line(f"launch: {message}", sys.stderr)


class Failure(NamedTuple):
    """Why a job failed: the rank that caused it, how it ended, and its last output."""

    rank: int
    cause: str
    last_lines: List[str]


def report_failure(failure: Failure, then: str = "; all other ranks have been ended") -> None:
    """Prints the failure, repeating the rank's last output, so that nobody has to scroll for it."""
    if failure.last_lines:
        lines = [f"last lines of rank {failure.rank}, which failed:", *failure.last_lines]
        say("\n    ".join(lines))
    say(f"rank {failure.rank} {failure.cause}{then}")


def die_with_parent() -> None:
    """Makes the kernel send SIGKILL to this process when its parent dies (Linux).

    Otherwise ranks would keep running after the launcher itself was killed.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def run(
    command: Sequence[str],
    stdin: str = "",
    env: Optional[Mapping[str, str]] = None,
    timeout: Optional[float] = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a command for its output; exit code 127 if it does not exist, 124 if it hangs."""
    try:
        done = subprocess.run(
            command, input=os.fsencode(stdin), env=env, capture_output=True, timeout=timeout
        )
        said = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        return subprocess.CompletedProcess(command, done.returncode, *said)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {timeout:g} s")


def lines_of(source: IO[bytes], end: re.Pattern[bytes] = LINE) -> Iterator[bytes]:
    """The lines of a stream as they come, each with its `end`, which a long or last one lacks."""
    rest = b""
    while chunk := os.read(source.fileno(), MAX_LINE):
        *lines, rest = end.split(rest + chunk)
        if len(rest) >= MAX_LINE:
            lines, rest = [*lines, rest], b""
        yield from lines
    if rest:
        yield rest


def drain(
    process: subprocess.Popen[bytes],
    note: Callable[[bytes], Optional[bytes]],
    end: re.Pattern[bytes] = LINE,
) -> List[threading.Thread]:
    """Starts threads that copy a process's output to this one's streams, line by line.

    `note` is called with each line, one at a time, and returns what is shown of it, None for
    nothing. A stream that is no pipe is left alone.
    """

    def copy(source: IO[bytes], target: IO[bytes]) -> None:
        for line in lines_of(source, end):
            with _noting:
                shown = note(line)
                # A reader that went away (`| head`) or a full disk must not stop the ranks.
                with suppress(OSError, ValueError):
                    if shown is not None:
                        target.write(shown)
                        target.flush()

    streams = [(process.stdout, sys.stdout), (process.stderr, sys.stderr)]
    threads = [
        threading.Thread(target=copy, args=(source, target.buffer), daemon=True)
        for source, target in streams
        if source is not None
    ]
    for thread in threads:
        thread.start()
    return threads


def shell_exit_code(returncode: int) -> int:
    """A `Popen.returncode` as a shell would report it: 128 + n for signal n."""
    return returncode if returncode >= 0 else 128 - returncode


def describe_exit(returncode: int) -> str:
    """What a `Popen.returncode` means, in words."""
    if returncode == EXIT_SAVED:
        return f"saved and asks to be run again (exit code {EXIT_SAVED})"
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:  # most real-time signals have none
        name = f"signal {-returncode}"
    if name == "SIGKILL":
        return "was killed by SIGKILL (kill -9, or the kernel when memory ran out: see dmesg)"
    return f"was killed by {name}"


WARNINGS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT, signal.SIGINT)
"""What Slurm and users send to all processes of a job for the ranks to hear."""

START_SECONDS = 60.0
"""In which ranks that failed to connect, after all had come, have done nothing else yet."""

RECONNECT = "ranks could not connect to each other as they started; starting them once more"


def found_no_peer(last_lines: Sequence[str]) -> bool:
    """Whether a rank's output shows that it could not connect to a peer which was there."""
    return any(_NOT_CONNECTED.search(line) for line in last_lines)


def lacks_cause(exited: bool, last_lines: Sequence[str]) -> bool:
    """Whether a failed rank's output does not show why the job failed.

    Either it lost a peer, or it `exited` (was not killed by a signal) without output, as ranks do
    where rank 0 prints for all.
    """
    return (exited and not last_lines) or any(_LOST_PEER.search(line) for line in last_lines)


def first_cause(
    failed: Sequence[T], lacks_cause: Callable[[T], bool], unresponsive: Sequence[T] = ()
) -> Optional[T]:
    """The rank to blame: the first of `failed` (in order of exit) whose output shows a cause.

    If all lack one, it is the first `unresponsive` rank (alive, but it had to be killed), and
    failing that the first that exited. None if nothing failed.
    """
    causes = (rank for rank in failed if not lacks_cause(rank))
    return next(iter([*causes, *unresponsive, *failed]), None)

"""Processes that several launchers start: how they ended, and which of them is to blame.

A rank that raises shuts Horovod down while it unwinds, so its peers often exit before it does. The
first to exit is therefore not always the cause; the last output of the ranks tells them apart.
"""

from __future__ import annotations

import ctypes
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO, Callable, List, Mapping, Optional, Sequence, TypeVar

from .ranks import EXIT_SAVED
from .streams import print_line

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_libc = ctypes.CDLL(None, use_errno=True)
_noting = threading.Lock()
T = TypeVar("T")  # a rank: its number, or its process

MAX_LINE = 2**16
"""Bytes after which a line is broken, so that output without newlines does not fill the memory."""

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
        return subprocess.run(
            command,
            input=stdin,
            env=env,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {timeout:g} s")


def drain(
    process: subprocess.Popen[bytes], note: Callable[[bytes], Optional[bytes]]
) -> List[threading.Thread]:
    """Starts threads that copy a process's output to this one's streams, line by line.

    `note` is called with each line, one at a time, and returns what is shown of it, None for
    nothing. A stream that is no pipe is left alone.
    """

    def copy(source: IO[bytes], target: IO[bytes]) -> None:
        for line in iter(lambda: source.readline(MAX_LINE), b""):
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
    failed: Sequence[T], without_cause: Sequence[T], unresponsive: Sequence[T]
) -> Optional[T]:
    """The rank to blame: the first of `failed` (in order of exit) whose output shows a cause.

    If all are `without_cause` (see `lacks_cause`), it is the first `unresponsive` rank (alive,
    but it had to be killed), and failing that the first that exited. None if nothing failed.
    """
    causes = [rank for rank in failed if rank not in without_cause]
    candidates = [*causes, *unresponsive, *failed]
    return candidates[0] if candidates else None

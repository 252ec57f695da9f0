"""Helpers for processes that several launchers use."""

from __future__ import annotations

import ctypes
import signal
import sys

from .ranks import EXIT_SAVED
from .streams import print_line

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_libc = ctypes.CDLL(None, use_errno=True)


def say(message: str) -> None:
    """Prints a message of the launcher to stderr; dropped if the terminal was closed."""
    print_line(f"launch: {message}", sys.stderr)


def die_with_parent() -> None:
    """Makes the kernel send SIGKILL to this process when its parent dies (Linux).

    Otherwise ranks would keep running after the launcher itself was killed.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


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

"""Console output that never ends a run: a line that cannot be written (full disk) is dropped."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Optional, TextIO


def print_line(text: str, stream: Optional[TextIO] = None) -> None:
    """Print a line at once, to ``stream`` or the standard output."""
    with contextlib.suppress(OSError):
        print(text, file=stream or sys.stdout, flush=True)


def open_standard_streams() -> None:
    """Open /dev/null in place of standard streams that are closed (``>&-``).

    Otherwise files take their numbers, and what libraries print goes into a checkpoint.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def escape_what_is_missing(stream: TextIO) -> None:
    """Escape characters that the stream's encoding (``LC_ALL=C``) lacks, as ``\\u4e2d``."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def warn(message: str) -> None:
    """Print a line that begins with ``warning:`` to the standard error."""
    print_line(f"warning: {message}", sys.stderr)


def flush() -> None:
    """Flush both streams; drop what cannot be written, or Python would fail at exit."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a shell may have closed them
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

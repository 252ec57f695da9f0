"""Console output that never ends a run: a line that cannot be written (full disk) is dropped.

The streams themselves are those of the launchers, launch/core/streams.py.
"""

from __future__ import annotations

import functools
import io
import sys
from typing import TextIO

from launch.core.streams import (
    USER_ERROR,
    LostAnswerError,
    answer,
    check_current_folder,
    leave,
    one_line,
    open_standard_streams,
    print_line,
    printable,
    run,
)

__all__ = [
    "USER_ERROR",
    "LostAnswerError",
    "answer",
    "check_current_folder",
    "escape_what_is_missing",
    "leave",
    "open_standard_streams",
    "print_line",
    "run",
    "warn",
    "warn_once",
]


def escape_what_is_missing(stream: TextIO) -> None:
    """Escape characters that the stream's encoding (``LC_ALL=C``) lacks, as ``\\u4e2d``."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def warn(message: str) -> None:
    """Print one line that begins with ``warning:`` to the standard error."""
    print_line(f"warning: {one_line(message)}", sys.stderr)


warn_once = functools.lru_cache(maxsize=None)(warn)  # in a process, of the same words

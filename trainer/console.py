"""Console output that never ends a run: a line that cannot be written (full disk) is dropped.

The streams themselves are those of the launchers, launch/core/streams.py.
"""

from __future__ import annotations

import functools
import io
import sys
from typing import Sequence, TextIO

from launch.core.streams import (
    USER_ERROR,
    LostAnswerError,
    answer,
    check_current_folder,
    leave,
    one_line,
    open_standard_streams,
    print_error,
    print_line,
    printable,
    run,
    version,
)


def escape_what_is_missing(stream: TextIO) -> None:
    """Escape characters that the stream's encoding (``LC_ALL=C``) lacks, as ``\\u4e2d``."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table: columns to the left, those of numbers to the right; the first row is its head."""
    columns = list(zip(*rows))
    numbers = [all(cell[:1].isdigit() for cell in column[1:] if cell) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers)
        ).rstrip()
        for row in rows
    )


def warn(message: str) -> None:
    """Print one line that begins with ``warning:`` to the standard error."""
    print_line(f"warning: {one_line(message)}", sys.stderr)


warn_once = functools.lru_cache(maxsize=None)(warn)  # in a process, of the same words

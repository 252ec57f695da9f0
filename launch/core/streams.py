"""Standard streams that cost no program its exit code; both programs of this project use it.

A stdout that cannot be written (a full disk, a reader that has gone as with ``| head``, a terminal
that was closed) makes a line of print raise, and Python's last flush turn any exit code into 120.
Slurm would then not requeue a run that has saved. So the streams drop what nobody takes; only an
:func:`answer` that is lost is an error. Standard library only, for any Python from 3.7 on.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import select
import stat
import sys
from typing import Any, Callable, NoReturn, Optional, TextIO, Type, Union

USER_ERROR = 2

# All but line ends and tabs: C0, C1, what turns the direction of a text around, and bytes that are
# no text.
_CONTROLS = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class LostAnswerError(OSError):
    """What a command was asked for could not be written to stdout; one line."""

    def __str__(self) -> str:
        return f"the standard output cannot be written: {self.strerror}"


def run(main: Callable[[], int], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Runs a program, and ends it with the exit code that `main` returns, or 2 for a lost answer.

    `leave` is :func:`leave` where threads may still print.
    """
    open_standard_streams()
    try:
        code = main()
    except LostAnswerError as error:
        print_error(str(error))
        code = USER_ERROR
    leave(code)


def open_standard_streams() -> None:
    """Makes stdout and stderr drop what they cannot write, and opens /dev/null for closed ones.

    A file or socket would take the number of a closed one (`>&-`, some daemons), and what libraries
    and ranks print would go into it. Call it before anything opens a file. Streams that were
    replaced, as in a notebook or under pytest, stay as they are.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = _open(sys.stdout or os.fdopen(1, "w", closefd=False), 1)
    sys.stderr = _open(sys.stderr or os.fdopen(2, "w", closefd=False), 2)


def version() -> str:
    """The version that pip installed, which is pyproject.toml's."""
    from importlib import metadata  # late: it takes a tenth of a second

    try:
        return metadata.version("gluon-horovod-trainer")
    except metadata.PackageNotFoundError:  # a folder on PYTHONPATH
        return "0+unknown"


def check_current_folder(error: Type[Exception] = ValueError) -> None:
    """Raises `error` in one line where the current folder was removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise error("the current folder was removed; cd to one that is there") from None


def printable(text: str) -> str:
    """`text` without power over a terminal: names in it may be of strangers."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """The same, on one line."""
    return printable(text).replace("\n", "\\n")


def print_line(text: str, stream: Optional[TextIO] = None, raw: bool = False) -> None:
    """Prints a line at once, to `stream` or stdout; dropped if it cannot be written.

    It is made `printable`, unless it is `raw`: what a program of the user's has printed. What the
    stream's encoding lacks is escaped.
    """
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = (text if raw else printable(text)).encode(encoding, "backslashreplace").decode(encoding)
    with contextlib.suppress(OSError):
        print(text, file=stream, flush=True)


def print_error(message: str) -> None:
    """Prints an error that the user can fix to stderr, on one line, whatever was given."""
    print_line(f"error: {' '.join(message.split())}", sys.stderr)


def write(data: Union[str, bytes]) -> None:
    """Writes to stdout at once; OSError if it cannot be written, whatever the reason."""
    stream: Any = sys.stdout
    sink = stream.sink if isinstance(stream, _Stream) else None
    if sink:
        sink.error = None
    (stream if isinstance(data, str) else stream.buffer).write(data)
    stream.flush()
    if sink and sink.error:
        raise sink.error


def answer(text: str) -> None:
    """Prints what the command was asked for; LostAnswerError if it is lost, say on a full disk.

    For a terminal it is made `printable`; a file or a program gets names as they are. A reader or a
    terminal that has gone does not want it: that is no error.
    """
    try:
        write(f"{printable(text) if sys.stdout.isatty() else text}\n")
    except OSError as error:
        if not _has_gone(error):
            raise LostAnswerError(error.errno, error.strerror) from error


def leave(code: int) -> NoReturn:
    """Ends the process at once, without waiting for threads or for what runs at exit."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class _Sink(io.FileIO):
    """The descriptor of a standard stream: drops what it cannot write, and remembers why."""

    error: Optional[OSError] = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                written = super().write(left)
                if written is None:  # another program has made it non-blocking, and it is full
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as error:
            self.error = error
        return size


class _Stream(io.TextIOWrapper):
    """Text on a sink, without a buffer between: a signal handler may print within a print."""

    mode = "w"

    def __init__(self, sink: _Sink, like: TextIO):
        super().__init__(
            sink,  # as Python itself does under PYTHONUNBUFFERED
            like.encoding,
            "surrogateescape" if like.errors == "strict" else like.errors,  # names of any bytes
            line_buffering=bool(like.line_buffering),
            write_through=bool(getattr(like, "write_through", False)),
        )
        self.sink = sink


def _open(stream: TextIO, number: int) -> TextIO:
    """A stream that never raises on the descriptor of `stream`, if that is `number`."""
    try:
        own = stream.fileno() == number and not isinstance(stream, _Stream)
    except (OSError, ValueError):  # io.UnsupportedOperation is both
        own = False
    if not own:
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    sink = _Sink(number, "w", closefd=False)
    sink.name = stream.name
    return _Stream(sink, stream)


def _has_gone(error: OSError) -> bool:
    """Whether nobody is there to read: a closed pipe, or a terminal that was closed."""
    if error.errno == errno.EIO:  # a broken disk's error too
        return stat.S_ISCHR(os.fstat(1).st_mode)
    return error.errno == errno.EPIPE

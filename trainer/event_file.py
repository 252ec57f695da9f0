"""TensorBoard's event files on a disk that may be full: points wait in memory until there is room.

tensorboardX opens what begins with a registered prefix through our factory; given the plain path
it would raise in the middle of a record, end the run, and leave a file that no reader can finish.
Nor does it need /dev/shm here, where its own queue between threads has a semaphore.
"""

from __future__ import annotations

import os
import queue
from pathlib import Path
from types import SimpleNamespace

from tensorboardX import event_file_writer
from tensorboardX.record_writer import register_writer_factory

from .console import warn

_PREFIX = "waiting"


def address(folder: Path) -> str:
    """What to give tensorboardX as the folder of its event files."""
    register_writer_factory(_PREFIX, _Factory())
    event_file_writer.multiprocessing = SimpleNamespace(Queue=_Queue)
    return f"{_PREFIX}:{folder}"


class _Queue(queue.Queue):
    """In place of multiprocessing's, which fails where /dev/shm is full or read-only."""

    def close(self) -> None:
        """As that one has it."""


class _Factory:
    """Opens event files, as tensorboardX asks for them."""

    def open(self, path: str) -> EventFile:
        return EventFile(_plain(path))

    def directory_check(self, path: str) -> None:
        os.makedirs(_plain(path), exist_ok=True)


def _plain(path: str) -> str:
    return path[len(_PREFIX) + 1 :]


class EventFile:
    """A file that takes all that is written, and puts into it what there is room for."""

    def __init__(self, path: str):
        self._path = path
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115
        self._waiting = bytearray()
        self._told = False

    def write(self, data: bytes) -> None:
        """Take ``data``; :meth:`flush` puts it into the file."""
        self._waiting += data

    def flush(self) -> None:
        """Put into the file what waits; what finds no room goes on waiting, which is told once."""
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
            self._told = False
        except OSError as error:
            if not self._told:
                warn(f"{self._path} cannot be written ({error.strerror}); its points wait for room")
            self._told = True

    def close(self) -> None:
        """A last :meth:`flush`, and the end."""
        self.flush()
        self._file.close()

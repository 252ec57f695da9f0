"""TensorBoard event files that survive a full disk: points wait in memory until there is room.

tensorboardX opens paths with a registered prefix through a factory. With a plain path it would
raise in the middle of a record, end the run and leave an unreadable file. Its queue is replaced as
well: multiprocessing's needs /dev/shm.
"""

from __future__ import annotations

import os
import queue
from pathlib import Path
from types import SimpleNamespace

from tensorboardX import event_file_writer
from tensorboardX.record_writer import register_writer_factory

from ..console import warn

_PREFIX = "waiting"


def address(folder: Path) -> str:
    """What to give tensorboardX as the folder of its event files."""
    register_writer_factory(_PREFIX, _Factory())
    event_file_writer.multiprocessing = SimpleNamespace(Queue=_Queue)
    return f"{_PREFIX}:{folder}"


class _Queue(queue.Queue):
    """Replaces multiprocessing.Queue, which fails where /dev/shm is full or read-only."""

    def close(self) -> None:
        """multiprocessing.Queue has this method."""


class _Factory:
    """Opens event files, as tensorboardX asks for them."""

    def open(self, path: str) -> EventFile:
        return EventFile(_plain(path))

    def directory_check(self, path: str) -> None:
        os.makedirs(_plain(path), exist_ok=True)


def _plain(path: str) -> str:
    return path[len(_PREFIX) + 1 :]


class EventFile:
    """A file that accepts every write, and keeps in memory what the disk has no room for."""

    def __init__(self, path: str):
        self._path = path
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115
        self._pending = bytearray()
        self._warned = False

    def write(self, data: bytes) -> None:
        """Buffer ``data`` until :meth:`flush`."""
        self._pending += data

    def flush(self) -> None:
        """Write what is pending; warn once where there is no room, and keep it."""
        try:
            while self._pending:
                del self._pending[: self._file.write(self._pending)]
            self._warned = False
        except OSError as error:
            if not self._warned:
                warn(f"{self._path} cannot be written ({error.strerror}); its points wait for room")
            self._warned = True

    def close(self) -> None:
        """Flush once more and close the file."""
        self.flush()
        self._file.close()

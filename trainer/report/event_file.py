"""TensorBoard event files that survive a full disk, and a kill right after a flush.

tensorboardX makes the summaries, but its SummaryWriter does not write them: it raises on a full
disk, in the middle of a record; it passes events to a thread that its flush does not wait for; and
its queue needs /dev/shm. A file is a sequence of records: the length of an event, the event, and a
checksum after each.
"""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path
from typing import Any, Optional

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from ..console import warn


class EventFile:
    """A new file in ``folder``, which keeps in memory what the disk has no room for.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, folder: Path):
        now = time.time_ns()  # TensorBoard reads a folder's files in the order of their names
        name = f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{now}"
        self._path = folder / name
        self._open()
        self._pending = bytearray()
        self._warned = False
        self.event(Event(file_version="brain.Event:2"))

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "x+b", buffering=0)  # noqa: SIM115

    def summary(self, summary: Any, step: Optional[int] = None) -> None:
        """Add a ``Summary``, which holds a point; as :meth:`event` does."""
        self.event(Event(summary=summary), step)

    def event(self, event: Event, step: Optional[int] = None) -> None:
        """Add ``event``, whose time is now; in memory until :meth:`flush`."""
        event.wall_time = time.time()
        if step is not None:
            event.step = int(step)
        content = event.SerializeToString()
        for part in (struct.pack("<Q", len(content)), content):
            self._pending += part + struct.pack("<I", masked_crc32c(part))

    def flush(self) -> None:
        """Write what is pending; warn once where there is no room, and keep it."""
        try:
            if not self._path.exists():  # removed or renamed, but still open: written once more
                self._file.seek(0)
                written = self._file.read()
                self._open()
                self._pending[:0] = written
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

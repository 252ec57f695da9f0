"""Ends the ranks of a launcher that is gone, however it went and whatever stands between.

The kernel would tell a wrapper (`bash -c '...; exit $?'`, `conda run`) of its parent's death, not
the rank behind it, and wrappers close inherited descriptors. So this is a process of the launcher.
When its stdin closes without a word, it kills every process that has the launch's id in its
environment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, List

SECONDS = 60.0  # for ranks to end after SIGKILL: one that waits for a disk does so later


@contextmanager
def watched(launch_id: str) -> Iterator[None]:
    """If this process ends within the block, so do its ranks, known by LAUNCH_ID."""
    watcher = subprocess.Popen(
        [sys.executable, "-IS", __file__, launch_id],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != "LAUNCH_ID"},
        start_new_session=True,
    )
    try:
        yield
    finally:
        watcher.communicate(b"done")


def ranks_of(launch_id: str) -> List[int]:
    """The processes with that LAUNCH_ID, as far as this user may see."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or gone
            if f"LAUNCH_ID={launch_id}".encode() in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
    return found


def main() -> None:
    if sys.stdin.read():
        return
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ranks = ranks_of(sys.argv[1])
        if not ranks:
            return
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    main()

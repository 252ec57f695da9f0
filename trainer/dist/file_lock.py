"""A lock between processes of any node, by a file; where the file system has none, a warning."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Iterator

from ..console import warn_once

# Lustre without `-o flock`, NFS without lockd, others.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_PAUSE = 0.05


@contextlib.contextmanager
def held(path: Path, seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock at ``path`` within the block, or until this process ends.

    Raises:
        TimeoutError: another process has held it for ``seconds``.
        OSError: the file cannot be opened, say because it is a symbolic link (to another's file).
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        _take(descriptor, path, time.monotonic() + seconds)
        yield
    finally:
        with contextlib.suppress(OSError):  # a forked child would keep it otherwise
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _take(descriptor: int, path: Path, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{path} is locked") from None
            time.sleep(_PAUSE)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return warn_once(
                f"{path.parent} is on a file system without locks ({error.strerror}): nothing "
                "keeps two runs of one name apart there"
            )

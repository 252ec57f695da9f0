"""What belongs to one user alone: folders that nobody else can change, and a secret of the user's.

Standard library only, as the batch step of a job needs.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

SECRET_BYTES = 32
_TRUSTED = (0, 65534)  # root; and who the kernel shows for root in a container of a user's


def check(path: Path) -> Path:
    """Returns `path`, resolved; raises PermissionError where other users could replace it.

    As OpenSSH's StrictModes has it: neither it nor a folder above belongs to, or can be written by,
    others; a folder above may be as /tmp is. A group of the user's own number is the user.
    """
    path = path.resolve()
    for place in (path, *path.parents):
        found = os.stat(place)
        if found.st_uid not in (os.geteuid(), *_TRUSTED):
            raise PermissionError(f"{place} belongs to another user ({found.st_uid})")
        open_to_group = found.st_mode & stat.S_IWGRP and found.st_gid != found.st_uid
        sticky = place != path and found.st_mode & stat.S_ISVTX
        if (found.st_mode & stat.S_IWOTH or open_to_group) and not sticky:
            raise PermissionError(f"{place} can be written by others: chmod go-w {place}")
    return path


def folder(path: Path) -> Path:
    """Makes a folder of mode 0700 unless it is there; raises OSError, also as `check` does."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return check(path)


def user_secret() -> bytes:
    """A secret that all of this user's processes share which have the same home folder.

    It is made at the first call. Raises OSError where it cannot be, or is not the user's alone.
    """
    place = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    if not os.path.isabs(place):
        raise OSError(f"this user has no home folder ({place})")
    path = folder(Path(place, "gluon-horovod-trainer")) / "launch-secret"
    if not os.path.lexists(path):
        with tempfile.NamedTemporaryFile(dir=path.parent) as made:  # of mode 0600
            made.write(secrets.token_bytes(SECRET_BYTES))
            made.flush()
            with suppress(FileExistsError):  # another process's, which is complete too
                os.link(made.name, path)
    secret = _read(path)
    if len(secret) != SECRET_BYTES:
        raise OSError(errno.EIO, "holds no secret; remove it, and it is made anew", str(path))
    return secret


def _read(path: Path) -> bytes:
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(opened)
        own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if not own or found.st_mode & 0o077:
            raise PermissionError(f"{path} is not this user's alone: chmod 600 {path}")
        return os.read(opened, SECRET_BYTES + 1)
    finally:
        os.close(opened)

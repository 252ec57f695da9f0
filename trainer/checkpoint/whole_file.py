"""Atomic writes: files are written under a temporary name and renamed when complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Iterator


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary file that replaces ``path`` unless an exception is raised.

    Devices and pipes are written directly. Raises OSError: the place is not writable, at once; or
    the disk is full.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    place = Path(os.path.realpath(path))  # keeps a symlink
    partial = place.with_name(f".{place.name}.partial")
    with _errors_name(path):
        partial.unlink(missing_ok=True)  # of a process that was killed, or somebody's link
        partial.touch(exist_ok=False)
    try:
        yield partial
        partial.replace(place)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files are moved to ``folder`` unless an exception is raised.

    ``folder`` is created if necessary; other files in it stay. Raises OSError: the place is not
    writable, at once; or the disk is full.
    """
    is_new = not folder.exists()
    with _errors_name(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield partial
        for file in partial.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Let an OSError name ``path`` instead of the temporary name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None

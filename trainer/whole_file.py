"""Files that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Iterator


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of ``path`` if nothing is raised meanwhile.

    Devices and pipes are written to as they are.

    Raises:
        OSError: at once where nothing can be written, or when there is no room.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    place = Path(os.path.realpath(path))  # a link stays one
    partial = place.with_name(f".{place.name}.partial")
    with _as_the_fault_of(path):
        partial.touch()
    try:
        yield partial
        partial.replace(place)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, whose files come into ``folder`` if nothing is raised meanwhile.

    What else is in ``folder`` stays there; it is made if it is not there.

    Raises:
        OSError: at once where nothing can be written, or when there is no room.
    """
    is_new = not folder.exists()
    with _as_the_fault_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield partial
        for file in partial.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()


@contextlib.contextmanager
def _as_the_fault_of(path: Path) -> Iterator[None]:
    """Errors name ``path``, not what is written beside it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None

"""A run's folder: locked against other runs, and what it held before set aside."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
from pathlib import Path
from typing import Iterator, Optional, Set

from .. import config
from ..config import Config
from ..console import print_line
from ..dist import file_lock
from ..errors import ConfigError
from . import whole_file
from .listing import listing

taken: Set[Path] = set()  # checkpoint folders of the runs that this process has begun


@contextlib.contextmanager
def taken_folder(settings: Config, start: Optional[Path]) -> Iterator[None]:
    """Prepare the run's folder, with its config in it, and lock it within the block.

    Args:
        start: the checkpoint that the run resumes from; None to start anew. Checkpoints in the
            folder that are not its ancestors are set aside.

    Raises:
        ConfigError: another run holds the lock.
    """
    folder = settings.folder
    with claimed(folder):
        own = {folder.resolve(), settings.checkpoint_folder.resolve()}
        if start is None or own.isdisjoint(start.resolve().parents):
            _begin(folder, config.as_yaml(settings))
        else:
            _set_newer_aside(settings.checkpoint_folder, start)
            settings.checkpoint_folder.mkdir(parents=True, exist_ok=True)
            _keep_config(folder / "config.yaml", config.as_yaml(settings))
        taken.add(settings.checkpoint_folder.resolve())
        yield


def _begin(folder: Path, config_text: str) -> None:
    """Create the folder of a new run; on a full disk nothing has been set aside yet."""
    made = folder.with_name(f".{folder.name}.begun")
    shutil.rmtree(made, ignore_errors=True)  # of a process that was killed
    try:
        (made / "checkpoints").mkdir(parents=True)
        (made / "config.yaml").write_text(config_text)
        set_aside(folder)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Turn an OSError within it into a ConfigError about ``folder``."""
    try:
        yield
    except OSError as error:
        about = f"{error.strerror or error}: {error.filename or folder}"
        raise ConfigError(
            f"the run's folder {folder} cannot be written ({about}); make room or give another "
            "output=..."
        ) from error


def _keep_config(path: Path, text: str) -> None:
    """Write ``text`` to the file, unless it is there already: a full disk is then no error."""
    if path.is_file() and path.read_text(errors="replace") == text:
        return
    with whole_file.replaced(path) as partial:
        partial.write_text(text)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against other runs within the block.

    Raises:
        ConfigError: another run holds the lock.
    """
    place = folder.resolve()  # one lock, through whatever symlinks
    place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(file_lock.held(place.parent / f".{place.name}.lock"))
        except TimeoutError:
            raise ConfigError(
                f"another run is using {folder}; give this one another name=... (ranks of one run "
                "must be started by horovodrun or `python -m launch`)"
            ) from None
        yield


def remade(settings: Config) -> bool:
    """Whether the run's folder was removed or renamed in mid-run; its config is there again then.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path = settings.folder / "config.yaml"
    if path.exists():
        return False
    settings.checkpoint_folder.mkdir(parents=True, exist_ok=True)
    _keep_config(path, config.as_yaml(settings))
    return True


def set_aside(folder: Path) -> None:
    """Rename ``folder``, if it exists, to the next free name beside it."""
    if folder.exists():
        aside = _free_name(folder)
        folder.rename(aside)
        # Not on stdout, which may have to be pure JSON.
        print_line(f"{folder} held an earlier run; it is {aside} now", sys.stderr)


def _set_newer_aside(checkpoints: Path, start: Path) -> None:
    """Move checkpoints newer than ``start``, damaged or not its descendants, out of the way."""
    newer = [path for path in listing(checkpoints) if path.name > start.name]
    if newer:
        aside = _free_name(checkpoints / "aside")  # in the same file system
        aside.mkdir()
        for path in newer:
            path.rename(aside / path.name)
        print_line(f"checkpoints after {start.name} are in {aside} now", sys.stderr)


def _free_name(folder: Path) -> Path:
    names = (Path(f"{folder}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())

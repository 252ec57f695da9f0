"""A run's folder: locked against other runs, what it held before set aside; its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Set

from .. import config
from ..config import Config
from ..config.load import read_file
from ..console import print_line
from ..dist import file_lock
from ..errors import ConfigError, nearest
from . import whole_file
from .files import problem
from .state import CheckpointError, RunState, read_state

_TRIES, _PAUSE = 10, 0.1  # seconds
_OWN = "config.yaml"  # in the folder of every run

taken: Set[Path] = set()  # checkpoint folders of the runs that this process has begun


class InUseError(ConfigError):
    """Another run holds the lock of a folder."""


def numbered(settings: Config) -> Config:
    """``settings`` under the one of NAME, NAME-2, ... that has their run, or the first free one."""
    form = re.compile(re.escape(settings.name) + r"(-([2-9]|[1-9]\d+))?")
    found = [path.parent.name for path in Path(settings.output).glob(f"*/{_OWN}")]
    there = sorted(filter(form.fullmatch, found), key=lambda name: (len(name), name))
    for name in there:  # maybe not all: those before it may have been removed
        named = dataclasses.replace(settings, name=name)
        if not changed(named):
            return named
    names = (f"{settings.name}-{number}" for number in itertools.count(2))
    free = (name for name in itertools.chain([settings.name], names) if name not in there)
    return dataclasses.replace(settings, name=next(free))


def changed(settings: Config) -> List[str]:
    """In what the run in the folder, if there is one, was made with other settings; in words."""
    path = settings.folder / _OWN
    if not path.exists():
        return []
    try:
        before = config.recorded(read_file(str(path)))
    except ConfigError as error:
        return [str(error)]
    return config.differences(before, config.to_dict(settings))


def take(
    settings: Config,
    start: Optional[Path],
    unnamed: Optional[Config],
    until_closed: contextlib.ExitStack,
) -> Config:
    """Hold :func:`taken_folder` until closed; returns the settings, with the name it has.

    ``unnamed`` are the settings before they were :func:`numbered`, if they were: a new run takes
    the next name where another launch has just begun one. Raises InUseError: another run holds the
    lock.
    """
    for left in reversed(range(_TRIES)):
        if unnamed is not None and start is None:
            settings = numbered(unnamed)
        try:
            until_closed.enter_context(taken_folder(settings, start))
            break
        except InUseError:
            if not left or unnamed is None:
                raise
            time.sleep(_PAUSE)  # until its config is there
    if unnamed is not None and unnamed.name != settings.name and (others := changed(unnamed)[:3]):
        print_line(
            f"{unnamed.folder} was made with other settings ({'; '.join(others)}); "
            f"this run is {settings.folder}",
            sys.stderr,
        )
    return settings


@contextlib.contextmanager
def taken_folder(settings: Config, start: Optional[Path]) -> Iterator[None]:
    """Prepare the run's folder, with its config in it, and lock it within the block.

    ``start`` is the checkpoint that the run resumes from; None to start anew. Checkpoints in the
    folder that are not its ancestors are set aside. Raises InUseError: another run holds the lock.
    """
    folder = settings.folder
    with claimed(folder):
        own = {folder.resolve(), settings.checkpoint_folder.resolve()}
        if start is None or own.isdisjoint(start.resolve().parents):
            _begin(folder, config.as_yaml(settings))
        else:
            _set_newer_aside(settings.checkpoint_folder, start)
            settings.checkpoint_folder.mkdir(parents=True, exist_ok=True)
            _keep_config(folder / _OWN, config.as_yaml(settings))
        taken.add(settings.checkpoint_folder.resolve())
        yield


def _begin(folder: Path, config_text: str) -> None:
    """Create the folder of a new run; on a full disk nothing has been set aside yet."""
    made = folder.with_name(f".{folder.name}.begun")
    shutil.rmtree(made, ignore_errors=True)  # of a process that was killed
    try:
        (made / "checkpoints").mkdir(parents=True)
        (made / _OWN).write_text(config_text)
        held = [name for name in (_OWN, "checkpoints") if (folder / name).exists()]
        if held or not folder.is_dir():
            set_aside(folder)
        place = folder.resolve()  # of a link, maybe on another disk
        if place.exists():  # made beforehand, as for a log
            for part in made.iterdir():
                shutil.move(str(part), str(place))
        else:
            shutil.move(str(made), str(place))
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
            f"the run's folder {folder} cannot be used ({about}); make room or give another "
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
    """Lock ``folder`` against other runs within the block. Raises InUseError: another run holds the
    lock.
    """
    place = folder.resolve()  # one lock, through whatever symlinks
    place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(file_lock.held(place.parent / f".{place.name}.lock"))
        except TimeoutError:
            raise InUseError(
                f"another run is using {folder}; give this one another name=... (ranks of one run "
                "must be started by horovodrun or `python -m launch`)"
            ) from None
        yield


def remade(settings: Config) -> bool:
    """Whether the run's folder was removed or renamed in mid-run; its config is there again then.
    Raises OSError: the folder cannot be made or written.
    """
    path = settings.folder / _OWN
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


def find_latest(
    folder: Path, report: Callable[[str], None], launch: Optional[str] = None
) -> Optional[Path]:
    """The newest valid checkpoint below ``folder``, of a ``launch`` where one is given; damaged
    ones are skipped, and ``report`` called with a message for each. Raises OSError: the folder
    cannot be read.
    """
    if folder.exists():
        os.listdir(folder)  # glob passes over a folder that must not be read, as if it were empty
    paths = listing(folder)
    if launch is not None:
        paths = [path for path, state in states(folder).items() if state.launch == launch]
    for path in reversed(paths):
        wrong = problem(path)
        if wrong is None:
            return path
        report(f"{wrong}; using the checkpoint before it")
    return None


def find_best(folder: Path) -> Optional[Path]:
    """The checkpoint of the highest test accuracy below ``folder``; of equals, the newest."""
    known = states(folder).items()
    scored = [(state.accuracy, path) for path, state in known if state.accuracy is not None]
    return max(scored)[1] if scored else None


def states(folder: Path) -> Dict[Path, RunState]:
    """What the checkpoints below ``folder`` say of themselves, oldest first.

    Those that cannot be read are left out: ``find_latest`` reports them.
    """
    found: Dict[Path, RunState] = {}
    for path in listing(folder):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found[path] = read_state(path)
    return found


def step_of(path: Path) -> int:
    """The step of the checkpoint at ``path``, from its name."""
    return int(path.name[len("step-") :])


def listing(folder: Path) -> List[Path]:
    """The checkpoints below ``folder``, oldest first, damaged ones included; not a user's copies.

    A save that was killed may have left one as ``replaced``.
    """
    names = re.compile(r"step-\d+(\.replaced)?")
    return sorted(path for path in folder.glob("step-*") if names.fullmatch(path.name))


def prune(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the newest ``keep`` and the one of the highest accuracy."""
    best = find_best(folder)
    for path in listing(folder)[:-keep]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)


def find(where: str) -> Path:
    """The whole checkpoint at ``where``, or the best in a run's folder. Raises CheckpointError:
    there is none, in which case runs in the same place are named, or it cannot be read.
    """
    try:
        return _find(Path(where))
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error


def _find(place: Path) -> Path:
    if not place.is_dir():
        names = [str(path.parent) for path in place.parent.glob("*/checkpoints")]
        names += [path.parent.name for path in Path(Config().output).glob("*/checkpoints")]
        raise CheckpointError(
            f"there is no folder {place}{nearest(str(place), names)}; give a run's name or folder, "
            "or a whole checkpoint"
        )
    inside = place / "checkpoints"
    saved = [find_best(inside), *reversed(listing(inside))] if inside.is_dir() else [place]
    path = next(filter(None, saved), None)
    if path is None:
        raise CheckpointError(f"{place} holds no checkpoint yet")
    wrong = problem(path)
    if wrong is not None:
        raise CheckpointError(f"{wrong}; give a run's folder or a whole checkpoint")
    return path

"""Where a run starts: from a checkpoint that fits its config, or anew."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Set

import filelock
from mxnet import gluon

from . import (
    batch_norm,
    checkpoint,
    config,
    dist,
    launched,
    optimizer_state,
    replica,
    whole_file,
)
from .config import Config
from .console import print_line, warn
from .settings import show

_taken: Set[Path] = set()  # checkpoint folders of the runs that this process has begun


def checkpoint_folder(settings: Config) -> Path:
    """The folder of the run's checkpoints."""
    return settings.folder / "checkpoints"


def choose(
    settings: Config, resume: str, force: bool, train_size: Optional[int] = None
) -> Optional[Path]:
    """The checkpoint to resume from; None to start anew. Reads only.

    ``none`` and a path apply to the first start of a launch. When the launcher restarts the ranks,
    after a fault or to resize the job, they resume from the newest checkpoint of the same launch.
    A second run in one process, as in a notebook, does not count as a restart.

    Args:
        resume: ``auto`` (the newest valid one in the run's folder, if any), ``none``, or a path.
        force: accept one that was made with other settings, or on another number of images.
        train_size: the number of training images; None does not compare it.

    Raises:
        CheckpointError: it is missing or damaged, or was made with settings that lead to other
            results.
        ConfigError: ``resume`` is no text or path.
    """
    if not isinstance(resume, (str, Path)):
        raise config.ConfigError(
            f"resume is {show(resume)}; it must be 'auto', 'none' or the path of a checkpoint"
        )
    folder = checkpoint_folder(settings)
    launch = None if folder.resolve() in _taken else launched.launch_id()
    path: Optional[Path] = None
    if resume == "auto" or launch is not None:
        path = checkpoint.find_latest(folder, warn, None if resume == "auto" else launch)
    if path is None and resume not in ("auto", "none"):
        path = Path(resume)
        inside = checkpoint.listing(path / "checkpoints")
        if inside:
            raise checkpoint.CheckpointError(
                f"cannot resume: {path} is a run's folder; give one of its checkpoints, e.g. "
                f"{inside[-1]}"
            )
        wrong = checkpoint.problem(path)
        if wrong is not None:
            raise checkpoint.CheckpointError(f"cannot resume: {wrong}")
    if path is None:
        return None
    before = checkpoint.read_state(path)
    changed = config.differences(before["config"], config.to_dict(settings))
    size = before.get("train_size")  # None in older ones
    if None not in (size, train_size) and size != train_size:
        changed.append(f"training images: {size} -> {train_size}")
    if changed and not force:
        raise checkpoint.CheckpointError(
            f"{path} was made with other settings ({'; '.join(changed)}); give the run another "
            "name=..., start it anew with --resume none, or resume all the same with --force"
        )
    return path


def restore(path: Optional[Path], net: gluon.Block, trainer: gluon.Trainer) -> Dict[str, Any]:
    """Give all ranks the weights, optimizer and state of the checkpoint at rank 0's ``path``.

    Where it is None they get the initial ones of rank 0; collective.

    Raises:
        CheckpointError: the checkpoint does not fit the net or the optimizer.
    """
    state: Dict[str, Any] = {"step": 0, "totals": [[0.0] * 3] * 2, "statistics": None}
    with dist.together():
        if path is not None:
            state = checkpoint.restore(path, net, trainer)
    batch_norm.connect(net)
    dist.broadcast_parameters(net.collect_params().values())
    optimizer_state.broadcast(net, trainer)
    state = dist.broadcast_object(state)
    replica.take_statistics(net, state["statistics"])
    return state


def take_folder(settings: Config, start: Optional[Path]) -> filelock.BaseFileLock:
    """Prepare the run's folder, with its config in it, and lock it.

    Args:
        start: the checkpoint that the run resumes from; None to start anew. Checkpoints in the
            folder that are not its ancestors are set aside.

    Returns:
        The lock; see :func:`claim`.

    Raises:
        ConfigError: another run holds the lock.
    """
    folder = settings.folder
    lock = claim(folder)
    own = {folder.resolve(), checkpoint_folder(settings).resolve()}
    if start is None or own.isdisjoint(start.resolve().parents):
        _begin(folder, config.as_yaml(settings))
    else:
        _set_newer_aside(checkpoint_folder(settings), start)
        checkpoint_folder(settings).mkdir(parents=True, exist_ok=True)
        _keep_config(folder / "config.yaml", config.as_yaml(settings))
    _taken.add(checkpoint_folder(settings).resolve())
    return lock


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
        raise config.ConfigError(
            f"the run's folder {folder} cannot be written ({about}); make room or give another "
            "output=..."
        ) from error


def _keep_config(path: Path, text: str) -> None:
    """Write ``text`` to the file, unless it is there already: a full disk is then no error."""
    if path.is_file() and path.read_text(errors="replace") == text:
        return
    with whole_file.replaced(path) as partial:
        partial.write_text(text)


def claim(folder: Path) -> filelock.BaseFileLock:
    """Lock ``folder`` against other runs, until the lock is released or this process ends.

    Raises:
        ConfigError: another run holds the lock.
    """
    place = folder.resolve()  # one lock, through whatever symlinks
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(str(place.parent / f".{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise config.ConfigError(
            f"another run is using {folder}; give this one another name=... (ranks of one run "
            "must be started by horovodrun or `python -m launch`)"
        ) from None
    return lock


def set_aside(folder: Path) -> None:
    """Rename ``folder``, if it exists, to the next free name beside it."""
    if folder.exists():
        aside = _free_name(folder)
        folder.rename(aside)
        # Not on stdout, which may have to be pure JSON.
        print_line(f"{folder} held an earlier run; it is {aside} now", sys.stderr)


def _set_newer_aside(checkpoints: Path, start: Path) -> None:
    """Move checkpoints newer than ``start``, damaged or not its descendants, out of the way."""
    newer = [path for path in checkpoint.listing(checkpoints) if path.name > start.name]
    if newer:
        aside = _free_name(checkpoints / "aside")  # in the same file system
        aside.mkdir()
        for path in newer:
            path.rename(aside / path.name)
        print_line(f"checkpoints after {start.name} are in {aside} now", sys.stderr)


def _free_name(folder: Path) -> Path:
    names = (Path(f"{folder}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())

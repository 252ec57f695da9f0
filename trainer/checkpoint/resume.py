"""Where a run starts: from a checkpoint that fits its config, or anew."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Tuple

import numpy as np
from mxnet import gluon

from .. import config, dist
from ..config import Config
from ..console import warn
from ..dist import environment
from ..errors import ConfigError, show
from . import files, optimizer_state
from .files import problem
from .listing import find_latest, listing
from .run_folder import taken
from .state import CheckpointError, RunState, read_state


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
        raise ConfigError(
            f"resume is {show(resume)}; it must be 'auto', 'none' or the path of a checkpoint"
        )
    folder = settings.checkpoint_folder
    launch = None if folder.resolve() in taken else environment.launch_id()
    path: Optional[Path] = None
    if resume == "auto" or launch is not None:
        path = find_latest(folder, warn, None if resume == "auto" else launch)
    if path is None and resume not in ("auto", "none"):
        path = Path(resume)
        inside = listing(path / "checkpoints")
        if inside:
            raise CheckpointError(
                f"cannot resume: {path} is a run's folder; give one of its checkpoints, e.g. "
                f"{inside[-1]}"
            )
        wrong = problem(path)
        if wrong is not None:
            raise CheckpointError(f"cannot resume: {wrong}")
    if path is None:
        return None
    before = read_state(path)
    changed = config.differences(before.config, config.to_dict(settings))
    size = before.train_size  # None in older ones
    if None not in (size, train_size) and size != train_size:
        changed.append(f"training images: {size} -> {train_size}")
    if changed and not force:
        raise CheckpointError(
            f"{path} was made with other settings ({'; '.join(changed)}); give the run another "
            "name=..., start it anew with --resume none, or resume all the same with --force"
        )
    return path


def restore(
    path: Optional[Path], net: gluon.Block, trainer: gluon.Trainer
) -> Tuple[RunState, Optional[np.ndarray]]:
    """Give all ranks the weights, optimizer and state of the checkpoint at rank 0's ``path``.

    Where it is None they get the initial ones of rank 0; collective.

    Returns:
        The state, and every rank's own running statistics, which are left to the caller.

    Raises:
        CheckpointError: the checkpoint does not fit the net or the optimizer.
    """
    found: Tuple[RunState, Optional[np.ndarray]] = RunState(), None
    with dist.together():
        if path is not None:
            found = files.restore(path, net, trainer)
    dist.broadcast_parameters(net.collect_params().values())
    optimizer_state.broadcast(net, trainer)
    state, statistics = dist.broadcast_object(found)
    return state, statistics

"""Where a run starts: from a checkpoint that fits its config, or anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
from mxnet import gluon

from .. import config, dist
from ..config import Config
from ..console import warn
from ..dist import environment
from ..errors import ConfigError, show
from ..mxnet_internals import ordered_parameters
from . import files, optimizer_state
from .files import problem
from .listing import find_latest, listing
from .run_folder import taken
from .state import CheckpointError, RunState, read_state


def choose(
    settings: Config,
    resume: str,
    force: bool,
    made_of: Optional[Dict[str, str]] = None,
    train_size: Optional[int] = None,
) -> Optional[Path]:
    """The checkpoint to resume from; None to start anew. Reads only.

    ``none`` and a path apply to the first start of a launch. When the launcher restarts the ranks,
    after a fault or to resize the job, they resume from the newest checkpoint of the same launch.
    A second run in one process, as in a notebook, does not count as a restart.

    Args:
        resume: ``auto`` (the newest valid one in the run's folder, if any), ``none``, or a path.
        force: accept one that was made with other settings, images, labels, net or loss.
        made_of: digests of these, by what they are of; see run/agreement.py.
        train_size: the number of training images; None, as for digests, compares nothing.

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
    if None not in (before.train_size, train_size) and before.train_size != train_size:
        changed.append(f"training images: {before.train_size} -> {train_size}")
    else:
        changed += _other_parts(before, made_of or {})
    if changed and not force:
        raise CheckpointError(
            f"{path} was made with other settings ({'; '.join(changed)}); give the run another "
            "name=..., start it anew with --resume none, or resume all the same with --force (in "
            'Python resume="none", force=True)'
        )
    return path


def _other_parts(before: RunState, made_of: Dict[str, str]) -> List[str]:
    """What else differs, in words; what was not recorded (older ones) is not compared."""
    differing = [k for k, v in before.made_of.items() if made_of.get(k, v) != v]
    # The net of a notebook may hold the weights that were saved; one of a restarted launch may
    # have been drawn anew.
    if "initial weights" in differing and (
        made_of["initial weights"] == before.weights
        or (before.launch is not None and before.launch == environment.launch_id())
    ):
        differing.remove("initial weights")
    return [f"other {name}" for name in differing]


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
    state, statistics = RunState(), None
    with dist.together():
        if path is not None:
            state, statistics = files.restore(path, net, trainer)
    dist.broadcast_parameters(ordered_parameters(net))
    optimizer_state.broadcast(net, trainer)
    told, statistics = dist.broadcast_object((dataclasses.asdict(state), statistics))
    return RunState(**told), statistics

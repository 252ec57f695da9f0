"""Where a run starts: from a checkpoint that fits its config, or anew."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from mxnet import gluon

from .. import config, dist
from ..config import Config
from ..console import warn
from ..dist import environment
from ..errors import ConfigError, show
from ..mxnet_internals import ordered_parameters
from . import files, optimizer_state
from .files import problem
from .run_folder import find_latest, listing, numbered, taken
from .state import CheckpointError, RunState, check_answers, read_state

_WAYS_OUT = (
    "give the run another name=..., start it anew with --resume none, or resume all the same with "
    '--force (in Python resume="none", force=True)'
)
_WEIGHTS, _LAYERS = "initial weights", "layers or multipliers"  # among what a run is made of


def choose_run(
    settings: Config,
    resume: str,
    force: bool,
    by_number: bool,
    made_of: Dict[str, str],
    train_size: int,
) -> Tuple[Config, Optional[Path]]:
    """The settings under the name that the run takes, and what :func:`choose` says of it."""
    named = numbered(settings) if by_number else settings
    return named, choose(named, resume, force, made_of, train_size)


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

    Raises CheckpointError: it is missing, damaged, or made with settings that lead to other
    results; ConfigError: ``resume`` is no text or path.
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
        wrong = problem(path)
        folders = (path, path / "checkpoints") if os.path.isdir(path) else ()
        inside = [found for folder in folders for found in listing(folder)]
        if inside:
            raise CheckpointError(
                f"cannot resume: {path} holds checkpoints; give one of them, e.g. {inside[-1]}"
            )
        if wrong is not None:
            raise CheckpointError(f"cannot resume: {wrong}; give auto, none or a whole checkpoint")
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
            f"{path} was made with other settings ({'; '.join(changed)}); {_WAYS_OUT}"
        )
    return path


def _other_parts(before: RunState, made_of: Dict[str, str]) -> List[str]:
    """What else differs, in words, or is there on one side alone; older ones compare nothing."""
    known = before.made_of
    names = {**known, **made_of} if known and made_of else {}
    differing = [name for name in names if known.get(name) != made_of.get(name)]
    if _LAYERS not in known:  # an earlier version's, with another digest of a loss
        older = {_LAYERS, *({"loss"} & known.keys() & made_of.keys())}
        differing = [name for name in differing if name not in older]
    # The net of a notebook may hold the weights that were saved; one of a restarted launch may
    # have been drawn anew, and one that is made anew need not have any.
    if _WEIGHTS in differing and (
        not {_WEIGHTS} <= known.keys() & made_of.keys()
        or made_of[_WEIGHTS] == before.weights
        or (before.launch is not None and before.launch == environment.launch_id())
    ):
        differing.remove(_WEIGHTS)
        if known and _WEIGHTS not in known and made_of[_WEIGHTS] != before.weights:
            warn("the net's own weights are replaced by those of the checkpoint")
    return [f"other {name}" for name in differing]


def restore(
    path: Optional[Path],
    net: gluon.Block,
    trainer: gluon.Trainer,
    answers: Optional[Callable[[], Sequence[float]]] = None,
) -> files.Restored:
    """Give all ranks the weights, optimizer and state of the checkpoint at rank 0's ``path``.

    Where it is None they get the initial ones of rank 0; collective. ``answers`` gives the scores
    that tell the net from others with its parameters; None compares nothing. What is returned is
    left to the caller; on other ranks than 0 without ``others``. Raises CheckpointError: the
    checkpoint does not fit the net or the optimizer.
    """
    found = files.Restored()
    with dist.together():
        if path is not None:
            found = files.restore(path, net, trainer)
            if answers is not None:
                check_answers(path, found.state, answers(), f"resume with that one, {_WAYS_OUT}")
    dist.broadcast_parameters(ordered_parameters(net))
    optimizer_state.broadcast(net, trainer)
    state = dataclasses.asdict(found.state)
    told, statistics, averaged = dist.broadcast_object((state, found.statistics, found.averaged))
    return files.Restored(RunState(**told), statistics, averaged, found.others)

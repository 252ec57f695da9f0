"""Checkpoints: a folder that is complete or absent, and finding the newest that is whole.

A checkpoint is ``step-00000468/`` with

- ``model.params``: parameters and running statistics, for ``net.load_parameters``;
- ``optimizer.params``: the optimizer's arrays, MXNet's own format, by parameter number, and
  each rank's own running statistics, where batch norm is not synced;
- ``state.json``: the step, the optimizer's counters, the config, the accuracy;
- ``manifest.json``: the SHA-256 of each of these.

It is written under another name, synced to disk and renamed. Nothing that is read is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import optimizer_state

PARAMETERS, OPTIMIZER, STATE, MANIFEST = (
    "model.params",
    "optimizer.params",
    "state.json",
    "manifest.json",
)


_NOTHING, _STATISTICS = "none", "statistics"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: which, what is wrong, the fix."""


def save(
    folder: Path,
    net: gluon.Block,
    trainer: gluon.Trainer,
    state: Dict[str, Any],
    keep: int,
    statistics: Optional[np.ndarray] = None,
) -> Path:
    """Write the checkpoint of ``state["step"]`` below ``folder``; rank 0 alone calls it.

    Afterwards the newest ``keep`` are left, and the one of the best ``state["accuracy"]``.

    Args:
        statistics: each rank's own running statistics, float32 (ranks, numbers), where they have.
    """
    path = folder / f"step-{state['step']:08d}"
    partial = folder / f".{path.name}.partial"
    for leftover in folder.glob(".step-*.partial"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    mx.nd.waitall()  # a forward under way may be laying weights out anew
    net.save_parameters(str(partial / PARAMETERS))
    arrays, counters = optimizer_state.read(trainer)
    if statistics is not None:
        arrays[_STATISTICS] = mx.nd.array(statistics)
    # MXNet refuses to save an empty dict; an optimizer may have no arrays.
    mx.nd.save(str(partial / OPTIMIZER), arrays or {_NOTHING: mx.nd.zeros((1,))})
    for name in (PARAMETERS, OPTIMIZER):
        _check_written(partial / name)
    (partial / STATE).write_text(json.dumps({**state, "optimizer": counters}, indent=1))
    sums = {name: _sha256(partial / name) for name in (PARAMETERS, OPTIMIZER, STATE)}
    (partial / MANIFEST).write_text(json.dumps(sums, indent=1))
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    replaced = folder / f"{path.name}.replaced"
    if path.exists():  # saved at this step before: one of the two can be found at any moment
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    partial.rename(path)
    _sync(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    _prune(folder, keep)
    return path


def restore(path: Path, net: gluon.Block, trainer: gluon.Trainer) -> Dict[str, Any]:
    """Put a checkpoint's arrays into ``net`` and ``trainer`` and return its state.

    ``state["statistics"]`` is what :func:`save` was given.

    Raises:
        CheckpointError: it does not fit the net or the optimizer.
    """
    load_parameters(path, net)
    state = read_state(path)
    arrays = mx.nd.load(str(path / OPTIMIZER))
    arrays.pop(_NOTHING, None)
    statistics = arrays.pop(_STATISTICS, None)
    state["statistics"] = None if statistics is None else statistics.asnumpy()
    try:
        optimizer_state.write(trainer, arrays, state.pop("optimizer"))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return state


def load_parameters(path: Path, net: gluon.Block) -> None:
    """Put a checkpoint's parameters and running statistics into ``net``."""
    context = next(iter(net.collect_params().values())).list_ctx()
    try:
        net.load_parameters(str(path / PARAMETERS), ctx=context)
    except (AssertionError, ValueError, mx.MXNetError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path} does not fit this net: {first}") from error


def read_state(path: Path) -> Dict[str, Any]:
    """A checkpoint's ``state.json``."""
    return json.loads((path / STATE).read_text())


def problem(path: Path) -> Optional[str]:
    """What is wrong with the checkpoint at ``path``; None when it is whole."""
    try:
        sums = json.loads((path / MANIFEST).read_text())
        if not isinstance(sums, dict) or sorted(sums) != sorted((PARAMETERS, OPTIMIZER, STATE)):
            return f"{path / MANIFEST} does not list its files"
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{path / name} is damaged: its SHA-256 is not the one in {MANIFEST}"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return f"{path} cannot be read: {error}"
    return None


def find_latest(folder: Path, report: Callable[[str], None]) -> Optional[Path]:
    """The newest whole checkpoint below ``folder``; damaged ones are reported and passed over."""
    for path in reversed(listing(folder)):
        wrong = problem(path)
        if wrong is None:
            return path
        report(f"{wrong}; going on from the checkpoint before it")
    return None


def find_best(folder: Path) -> Optional[Path]:
    """The checkpoint of the highest test accuracy below ``folder``, the newest of equals."""
    scored = [(_accuracy(path), path) for path in listing(folder)]
    known = [(accuracy, path) for accuracy, path in scored if accuracy is not None]
    return max(known)[1] if known else None


def _accuracy(path: Path) -> Optional[float]:
    try:
        accuracy = read_state(path)["accuracy"]
    # A damaged one is not the best; find_latest reports it.
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return accuracy if isinstance(accuracy, float) else None


def listing(folder: Path) -> List[Path]:
    """The checkpoints below ``folder``, oldest first; whole or not."""
    return sorted(folder.glob("step-[0-9]*"))


def _prune(folder: Path, keep: int) -> None:
    best = find_best(folder)
    for path in listing(folder)[:-keep]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)


def _check_written(path: Path) -> None:
    """Read arrays back: MXNet does not notice when the last block of a file finds no room."""
    try:
        mx.nd.load(str(path))
    except mx.MXNetError as error:
        raise OSError(f"{path} could not be written whole; is the disk full?") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

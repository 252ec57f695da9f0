"""Checkpoints: folders that are complete or absent; writing, finding and restoring them.

A checkpoint is ``step-00000468/`` with

- ``model.params``: parameters and running statistics, for ``net.load_parameters``;
- ``optimizer.params``: the optimizer's arrays by parameter, in MXNet's format, and
  each rank's own running statistics where batch norm is not synced; with ``train.ema``, whose
  averages ``model.params`` has, the parameters that train;
- ``state.json``: the step, the optimizer's counters, the config, the accuracy;
- ``manifest.json``: the SHA-256 of each of these.

It is written under a temporary name, synced to disk and renamed. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional

import mxnet as mx
import numpy as np
from mxnet import gluon

from ..batch_norm import running_statistics
from ..console import warn_once
from ..errors import first_line
from ..model import ema
from ..mxnet_internals import structural_parameters
from . import optimizer_state, params_file
from .state import MANIFEST, OPTIMIZER, PARAMETERS, STATE, CheckpointError, RunState, read_state

_NOTHING, _STATISTICS, _AVERAGED = "none", "statistics", "averaged statistics"

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # as on CIFS, and some of FUSE and 9p

_ANEW = "give the run another name=..., or start it anew with --resume none"


class SaveError(RuntimeError):
    """A checkpoint could not be written: which, and why. Older ones are unchanged."""


class Snapshot(NamedTuple):
    """The content of a checkpoint, copied to the host, so that training can continue."""

    parameters: optimizer_state.Arrays  # by the names that ``net.load_parameters`` takes
    optimizer: optimizer_state.Arrays  # and _STATISTICS, where ranks have their own
    state: RunState


def snapshot(
    net: gluon.Block,
    trainer: gluon.Trainer,
    state: RunState,
    statistics: Optional[np.ndarray] = None,
    averaged: Optional[np.ndarray] = None,
    others: Optional[optimizer_state.Arrays] = None,
) -> Snapshot:
    """Copy the run between two steps, after those under way, for :func:`restore`.

    The optimizer's counters are added to ``state``. ``statistics`` are every rank's own running
    ones, (ranks, elements), where they differ, ``averaged`` those of their averages, and ``others``
    what ``net`` does not hold, see :class:`trainer.model.ema.Ema`.
    """
    mx.nd.waitall()  # oneDNN reorders weights in place during a forward
    parameters = structural_parameters(net).items()
    arrays, counters = optimizer_state.read(net, trainer)
    optimizer = {name: a.copyto(mx.cpu()) for name, a in {**arrays, **(others or {})}.items()}
    for name, rows in ((_STATISTICS, statistics), (_AVERAGED, averaged)):
        if rows is not None:
            optimizer[name] = mx.nd.array(rows, dtype=rows.dtype)
    content = Snapshot(
        {name: parameter.data().copyto(mx.cpu()) for name, parameter in parameters},
        optimizer,
        replace(state, optimizer={**counters, "shapes": _shapes(optimizer)}),
    )
    mx.nd.waitall()  # now the writing thread may use the copies
    return content


def write(folder: Path, content: Snapshot) -> Path:
    """Write the checkpoint of ``content.state.step`` below ``folder``; rank 0 alone calls it.

    Safe to call from any thread: it touches only its own files and arrays. Raises SaveError: the
    disk is full, the folder cannot be written, ...
    """
    path = folder / f"step-{content.state.step:08d}"
    partial = folder / f".{path.name}.partial"
    try:
        _write(partial, content)
        _put_in_place(partial, path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)  # frees the space
        raise SaveError(f"{path} could not be written: {error.strerror or error}") from error
    return path


def _write(partial: Path, content: Snapshot) -> None:
    """Write all files of a checkpoint and sync them to disk."""
    for leftover in partial.parent.glob(".step-*.partial"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_arrays(partial / PARAMETERS, content.parameters)
    # MXNet refuses to save an empty dict; an optimizer may have no arrays.
    _write_arrays(partial / OPTIMIZER, content.optimizer or {_NOTHING: mx.nd.zeros((1,))})
    (partial / STATE).write_text(content.state.as_json())
    sums = {name: _sha256(partial / name) for name in (PARAMETERS, OPTIMIZER, STATE)}
    (partial / MANIFEST).write_text(json.dumps(sums, indent=1))
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)


def _write_arrays(path: Path, arrays: optimizer_state.Arrays) -> None:
    with params_file.whole(path):
        mx.nd.save(str(path), arrays)


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename a finished checkpoint to its final name, replacing one of that name."""
    replaced = path.with_name(f"{path.name}.replaced")
    if path.exists():  # this step was saved before; at any moment one of the two can be found
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    partial.rename(path)
    _sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


class Restored(NamedTuple):
    """What a checkpoint holds besides the net and the optimizer, as :func:`snapshot` got it."""

    state: RunState = RunState()
    statistics: Optional[np.ndarray] = None
    averaged: Optional[np.ndarray] = None
    others: Mapping[str, mx.nd.NDArray] = {}


def restore(path: Path, net: gluon.Block, trainer: gluon.Trainer) -> Restored:
    """Load a checkpoint into ``net`` and ``trainer``. Raises CheckpointError: it does not fit the
    net or the optimizer.
    """
    load_parameters(path, net)
    state = read_state(path)
    arrays = _loaded(path / OPTIMIZER)
    others = {name: arrays.pop(name) for name in list(arrays) if name.startswith(ema.TRAINED)}
    shapes = {ema.TRAINED + name: p.shape for name, p in structural_parameters(net).items()}
    size = (sum(p.data().size for p in running_statistics.parameters(net)),)
    rows = [arrays.pop(name, None) for name in (_STATISTICS, _AVERAGED)]
    if any(row is not None and row.shape[1:] != size for row in rows) or any(
        array.shape != shapes.get(name) for name, array in others.items()
    ):
        raise CheckpointError(f"{path}: its running statistics do not fit this net; {_ANEW}")
    try:
        optimizer_state.write(net, trainer, arrays, state.optimizer)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; {_ANEW}") from error
    statistics, averaged = (None if row is None else row.asnumpy() for row in rows)
    return Restored(state, statistics, averaged, others)


def load_parameters(path: Path, net: gluon.Block) -> None:
    """Load parameters and running statistics into ``net``: a checkpoint's, or those of a file.
    Raises CheckpointError: the file cannot be read, is damaged, or does not fit the net.
    """
    file = path / PARAMETERS if path.is_dir() else path
    _check_arrays(file)
    context = next(iter(net.collect_params().values())).list_ctx()
    try:
        net.load_parameters(str(file), ctx=context)
    except (AssertionError, ValueError, mx.MXNetError) as error:
        raise CheckpointError(
            f"{path} does not fit this net: {first_line(error)}; name the one it was made with, by "
            "model.factory and model.arguments, or have the run of another net begin anew, by "
            'another name=... or --resume none (in Python resume="none")'
        ) from error


def _check_arrays(path: Path) -> None:
    wrong = params_file.problem(path)
    if wrong is not None:
        raise CheckpointError(f"{path} cannot be used: {wrong}")


def problem(path: Path) -> Optional[str]:
    """What is wrong with the checkpoint at ``path``; None if it is complete and undamaged."""
    files = PARAMETERS, OPTIMIZER, STATE
    try:
        if not path.is_dir():
            return f"{path} is no checkpoint's folder"
        for name in (MANIFEST, *files):
            if not (path / name).is_file():  # nor a pipe, or a device, of which there is no end
                return f"{path / name} is missing"
        sums = json.loads((path / MANIFEST).read_text())
        if not isinstance(sums, dict) or sorted(sums) != sorted(files):
            return f"{path / MANIFEST} does not list its files"
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{path / name} is damaged: its SHA-256 is not the one in {MANIFEST}"
        state = read_state(path)
        for name in (PARAMETERS, OPTIMIZER):
            arrays = _loaded(path / name)
            for key, array in arrays.items():
                if np.isnan(array.asnumpy()).any():
                    return f"{path / name} cannot be used: {key} holds NaN"
        held = _shapes(arrays)
        if held != state.optimizer.get("shapes", held):  # older ones list none
            return f"{path / OPTIMIZER} does not hold the arrays that {STATE} lists"
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError, RecursionError) as error:
        return f"{path} cannot be read: {error}"
    return None


def _loaded(path: Path) -> optimizer_state.Arrays:
    """The arrays in a checkpoint's file."""
    _check_arrays(path)
    try:
        arrays = mx.nd.load(str(path))
    except mx.MXNetError as error:
        raise CheckpointError(f"{path} cannot be used: {first_line(error)}") from None
    arrays.pop(_NOTHING, None)
    return arrays


def _shapes(arrays: optimizer_state.Arrays) -> Dict[str, List[int]]:
    return {name: list(array.shape) for name, array in arrays.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Sync a file or folder to disk, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        kind = "files" if path.is_file() else "folders"
        warn_once(
            f"the file system of the checkpoints cannot sync {kind} to disk ({error.strerror}): "
            "a power cut may cost the newest one"
        )
    finally:
        os.close(descriptor)

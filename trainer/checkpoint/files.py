"""Checkpoints: folders that are complete or absent; writing, finding and restoring them.

A checkpoint is ``step-00000468/`` with

- ``model.params``: parameters and running statistics, for ``net.load_parameters``;
- ``optimizer.params``: the optimizer's arrays by parameter, in MXNet's format, and
  each rank's own running statistics where batch norm is not synced;
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
from typing import NamedTuple, Optional, Tuple

import mxnet as mx
import numpy as np
from mxnet import gluon

from ..batch_norm import running_statistics
from ..console import warn_once
from ..errors import first_line
from ..mxnet_internals import structural_parameters
from . import optimizer_state, params_file
from .state import (
    MANIFEST,
    OPTIMIZER,
    PARAMETERS,
    STATE,
    CheckpointError,
    RunState,
    read_state,
)

_NOTHING, _STATISTICS = "none", "statistics"

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
) -> Snapshot:
    """Copy the state of the run between two steps; waits for the steps under way.

    Args:
        state: what :func:`read_state` should return; the optimizer's counters are added.
        statistics: every rank's own running statistics, (ranks, elements), where they differ.
    """
    mx.nd.waitall()  # oneDNN reorders weights in place during a forward
    parameters = structural_parameters(net).items()
    arrays, counters = optimizer_state.read(net, trainer)
    content = Snapshot(
        {name: parameter.data().copyto(mx.cpu()) for name, parameter in parameters},
        {name: array.copyto(mx.cpu()) for name, array in arrays.items()},
        replace(state, optimizer=counters),
    )
    if statistics is not None:
        content.optimizer[_STATISTICS] = mx.nd.array(statistics, dtype=statistics.dtype)
    mx.nd.waitall()  # now the writing thread may use the copies
    return content


def write(folder: Path, content: Snapshot) -> Path:
    """Write the checkpoint of ``content.state.step`` below ``folder``; rank 0 alone calls it.

    Safe to call from any thread: it touches only its own files and arrays.

    Raises:
        SaveError: the disk is full, the folder cannot be written, ...
    """
    path = folder / f"step-{content.state.step:08d}"
    partial = folder / f".{path.name}.partial"
    try:
        _write(partial, content)
        _put_in_place(partial, path)
    except OSError as error:
        reason = _reason(error, folder)
        shutil.rmtree(partial, ignore_errors=True)  # frees the space
        raise SaveError(f"{path} could not be written: {reason}") from error
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


def _reason(error: OSError, folder: Path) -> str:
    """Why a checkpoint could not be written, as a phrase."""
    if error.errno not in (errno.ENOSPC, errno.EIO):
        return str(error.strerror or error)
    try:
        room = f"{shutil.disk_usage(folder).free:,} bytes are free there"
    except OSError:
        room = "is the folder there?"
    return f"{error.strerror}; {room}"


def restore(
    path: Path, net: gluon.Block, trainer: gluon.Trainer
) -> Tuple[RunState, Optional[np.ndarray]]:
    """Load a checkpoint into ``net`` and ``trainer``.

    Returns:
        Its state, and every rank's own running statistics as :func:`snapshot` was given them.

    Raises:
        CheckpointError: it does not fit the net or the optimizer.
    """
    load_parameters(path, net)
    state = read_state(path)
    _check_arrays(path / OPTIMIZER)
    arrays = mx.nd.load(str(path / OPTIMIZER))
    arrays.pop(_NOTHING, None)
    statistics = arrays.pop(_STATISTICS, None)
    running = running_statistics.parameters(net)
    if statistics is not None and statistics.shape[1:] != (sum(p.data().size for p in running),):
        raise CheckpointError(f"{path}: its running statistics do not fit this net; {_ANEW}")
    try:
        optimizer_state.write(net, trainer, arrays, state.optimizer)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; {_ANEW}") from error
    return state, None if statistics is None else statistics.asnumpy()


def load_parameters(path: Path, net: gluon.Block) -> None:
    """Load parameters and running statistics into ``net``: a checkpoint's, or those of a file.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or does not fit the net.
    """
    file = path / PARAMETERS if path.is_dir() else path
    try:
        _check_arrays(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
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
        for name in (MANIFEST, *files):
            if not (path / name).is_file():  # nor a pipe, or a device, of which there is no end
                return f"{path / name} is missing"
        sums = json.loads((path / MANIFEST).read_text())
        if not isinstance(sums, dict) or sorted(sums) != sorted(files):
            return f"{path / MANIFEST} does not list its files"
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{path / name} is damaged: its SHA-256 is not the one in {MANIFEST}"
        read_state(path)
        for name in (PARAMETERS, OPTIMIZER):
            _check_arrays(path / name)
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError, RecursionError) as error:
        return f"{path} cannot be read: {error}"
    return None


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

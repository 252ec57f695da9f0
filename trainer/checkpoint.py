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
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import optimizer_state, params_file, running_statistics
from .early_stopping import is_saved_plateau
from .settings import UserError, show

PARAMETERS, OPTIMIZER, STATE, MANIFEST = (
    "model.params",
    "optimizer.params",
    "state.json",
    "manifest.json",
)

_NOTHING, _STATISTICS = "none", "statistics"

_ANEW = "give the run another name=..., or start it anew with --resume none"


class CheckpointError(UserError):
    """A checkpoint cannot be used: which, why, and the fix."""


class SaveError(RuntimeError):
    """A checkpoint could not be written: which, and why. Older ones are unchanged."""


class Snapshot(NamedTuple):
    """The content of a checkpoint, copied to the host, so that training can continue."""

    parameters: optimizer_state.Arrays  # by the names that ``net.load_parameters`` takes
    optimizer: optimizer_state.Arrays  # and _STATISTICS, where ranks have their own
    state: Dict[str, Any]


def snapshot(
    net: gluon.Block,
    trainer: gluon.Trainer,
    state: Dict[str, Any],
    statistics: Optional[np.ndarray] = None,
) -> Snapshot:
    """Copy the state of the run between two steps; waits for the steps under way.

    Args:
        state: ``step`` and whatever else :func:`read_state` should return.
        statistics: every rank's own running statistics, (ranks, elements), where they differ.
    """
    mx.nd.waitall()  # oneDNN reorders weights in place during a forward
    parameters = net._collect_params_with_prefix().items()
    arrays, counters = optimizer_state.read(net, trainer)
    content = Snapshot(
        {name: parameter.data().copyto(mx.cpu()) for name, parameter in parameters},
        {name: array.copyto(mx.cpu()) for name, array in arrays.items()},
        {**state, "optimizer": counters},
    )
    if statistics is not None:
        content.optimizer[_STATISTICS] = mx.nd.array(statistics, dtype=statistics.dtype)
    mx.nd.waitall()  # now the writing thread may use the copies
    return content


def write(folder: Path, content: Snapshot, keep: int) -> Path:
    """Write the checkpoint of ``content.state["step"]`` below ``folder``; rank 0 alone calls it.

    Then all but the newest ``keep`` and the one of the best ``state["accuracy"]`` are deleted. Safe
    to call from any thread: it touches only its own files and arrays.

    Raises:
        SaveError: the disk is full, the folder cannot be written, ...
    """
    path = folder / f"step-{content.state['step']:08d}"
    partial = folder / f".{path.name}.partial"
    try:
        _write(partial, content)
        _put_in_place(partial, path)
    except OSError as error:
        reason = _reason(error, folder)
        shutil.rmtree(partial, ignore_errors=True)  # frees the space
        raise SaveError(f"{path} could not be written: {reason}") from error
    _prune(folder, keep)
    return path


def _write(partial: Path, content: Snapshot) -> None:
    """Write all files of a checkpoint and sync them to disk."""
    for leftover in partial.parent.glob(".step-*.partial"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_arrays(partial / PARAMETERS, content.parameters)
    # MXNet refuses to save an empty dict; an optimizer may have no arrays.
    _write_arrays(partial / OPTIMIZER, content.optimizer or {_NOTHING: mx.nd.zeros((1,))})
    (partial / STATE).write_text(json.dumps(content.state, indent=1))
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


def restore(path: Path, net: gluon.Block, trainer: gluon.Trainer) -> Dict[str, Any]:
    """Load a checkpoint into ``net`` and ``trainer`` and return its state.

    ``state["statistics"]`` is the array that :func:`snapshot` was given.

    Raises:
        CheckpointError: it does not fit the net or the optimizer.
    """
    load_parameters(path, net)
    state = read_state(path)
    _check_arrays(path / OPTIMIZER)
    arrays = mx.nd.load(str(path / OPTIMIZER))
    arrays.pop(_NOTHING, None)
    statistics = arrays.pop(_STATISTICS, None)
    state["statistics"] = None if statistics is None else statistics.asnumpy()
    running = running_statistics.parameters(net)
    if statistics is not None and statistics.shape[1:] != (sum(p.data().size for p in running),):
        raise CheckpointError(f"{path}: its running statistics do not fit this net; {_ANEW}")
    try:
        optimizer_state.write(net, trainer, arrays, state.pop("optimizer"))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; {_ANEW}") from error
    return state


def load_parameters(path: Path, net: gluon.Block) -> None:
    """Load a checkpoint's parameters and running statistics into ``net``.

    Raises:
        CheckpointError: the file is damaged, or does not fit the net.
    """
    _check_arrays(path / PARAMETERS)
    context = next(iter(net.collect_params().values())).list_ctx()
    try:
        net.load_parameters(str(path / PARAMETERS), ctx=context)
    except (AssertionError, ValueError, mx.MXNetError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path} does not fit this net: {first}; name the one it was made with, by "
            "model.factory and model.arguments, or have the run of another net begin anew, by "
            'another name=... or --resume none (in Python resume="none")'
        ) from error


def _check_arrays(path: Path) -> None:
    wrong = params_file.problem(path)
    if wrong is not None:
        raise CheckpointError(f"{path} cannot be used: {wrong}")


def read_state(path: Path) -> Dict[str, Any]:
    """A checkpoint's ``state.json``.

    Raises:
        CheckpointError: a value is missing or of the wrong type.
    """
    state = json.loads((path / STATE).read_text())
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE} holds no state of a run")
    for name, fits in _FITS.items():
        if not fits(state.get(name)):
            raise CheckpointError(f"{path / STATE} says {name} is {show(state.get(name))}")
    return state


def _are_totals(value: Any) -> bool:
    """Whether ``value`` looks like ``TrainMetrics.totals()``: two rows of three sums."""
    try:
        return np.shape(value) == (2, 3) and all(0 <= n < np.inf for row in value for n in row)
    except (TypeError, ValueError):
        return False


def _is_image_shape(value: Any) -> bool:
    """Whether ``value`` is [height, width] or [height, width, channels]."""
    sizes = isinstance(value, list) and all(type(n) is int and 0 < n < 2**16 for n in value)
    return sizes and len(value) in (2, 3)


# What a resumed run reads from its state, and how to validate it.
_FITS: Dict[str, Callable[[Any], bool]] = {
    "step": lambda value: type(value) is int and 0 <= value < 2**53,
    "totals": _are_totals,
    "accuracy": lambda value: value is None or isinstance(value, float),
    "config": lambda value: isinstance(value, dict),
    "image_shape": lambda value: value is None or _is_image_shape(value),  # None in older ones
    "train_size": lambda value: value is None or type(value) is int,  # None in older ones
    "optimizer": lambda value: isinstance(value, dict),
    "plateau": lambda value: value is None or is_saved_plateau(value),  # None in older ones
}


def problem(path: Path) -> Optional[str]:
    """What is wrong with the checkpoint at ``path``; None if it is complete and undamaged."""
    try:
        sums = json.loads((path / MANIFEST).read_text())
        if not isinstance(sums, dict) or sorted(sums) != sorted((PARAMETERS, OPTIMIZER, STATE)):
            return f"{path / MANIFEST} does not list its files"
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{path / name} is damaged: its SHA-256 is not the one in {MANIFEST}"
        read_state(path)
        for name in (PARAMETERS, OPTIMIZER):
            _check_arrays(path / name)
    except CheckpointError as error:
        return str(error)
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return f"{path} cannot be read: {error}"
    return None


def find_latest(
    folder: Path, report: Callable[[str], None], launch: Optional[str] = None
) -> Optional[Path]:
    """The newest valid checkpoint below ``folder``; damaged ones are reported and skipped.

    Args:
        report: called with a message for each damaged one.
        launch: consider only those whose ``state["launch"]`` is this.
    """
    for path in reversed(listing(folder)):
        if launch is not None and _of_state(path, "launch") != launch:
            continue
        wrong = problem(path)
        if wrong is None:
            return path
        report(f"{wrong}; using the checkpoint before it")
    return None


def find_best(folder: Path) -> Optional[Path]:
    """The checkpoint of the highest test accuracy below ``folder``; of equals, the newest."""
    scored = [(_accuracy(path), path) for path in listing(folder)]
    known = [(accuracy, path) for accuracy, path in scored if accuracy is not None]
    return max(known)[1] if known else None


def _accuracy(path: Path) -> Optional[float]:
    accuracy = _of_state(path, "accuracy")
    return accuracy if isinstance(accuracy, float) else None


def _of_state(path: Path, name: str) -> Any:
    """One value of a checkpoint's state; None where it is missing or the state unreadable."""
    try:
        return read_state(path).get(name)
    # A damaged checkpoint is not the best; find_latest reports it.
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def step_of(path: Path) -> int:
    """The step of the checkpoint at ``path``, from its name."""
    return int(path.name[len("step-") :])


def listing(folder: Path) -> List[Path]:
    """The checkpoints below ``folder``, oldest first, damaged ones included."""
    return sorted(folder.glob("step-[0-9]*"))


def _prune(folder: Path, keep: int) -> None:
    best = find_best(folder)
    for path in listing(folder)[:-keep]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Sync a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

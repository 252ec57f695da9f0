"""The state of an optimizer, arrays and counters: read, restored, and broadcast over ranks."""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

import mxnet as mx
from mxnet import gluon

from .. import dist
from ..errors import ConfigError, show
from ..mxnet_internals import (
    all_parameters,
    optimizer_arrays,
    structural_parameters,
    update_counts,
    updater,
)

Arrays = Dict[str, mx.nd.NDArray]  # keys: "<parameter's name in the net>.<index in its state>"


def read(net: gluon.Block, trainer: gluon.Trainer) -> Tuple[Arrays, Dict[str, Any]]:
    """The arrays (momenta and the like), and the counters as JSON-serializable values."""
    optimizer, names = trainer.optimizer, _names(net, trainer)
    arrays = {
        f"{names[index]}.{place}": array
        for index in updater(trainer).states
        for place, array in enumerate(optimizer_arrays(trainer, index))
    }
    counters = {
        "name": type(optimizer).__name__,
        "num_update": optimizer.num_update,
        "update_counts": {names[k]: v for k, v in update_counts(trainer).items()},
        # As Nadam's product of momenta, and the last learning rate of LARS, at first None.
        "numbers": {
            name: vars(optimizer)[name] for name in optimizer.moved if name in vars(optimizer)
        },
    }
    return arrays, counters


def write(
    net: gluon.Block, trainer: gluon.Trainer, arrays: Arrays, counters: Dict[str, Any]
) -> None:
    """Restore what :func:`read` returned; ValueError if it is of another optimizer or net, or
    malformed.
    """
    optimizer = trainer.optimizer
    name = type(optimizer).__name__
    if counters.get("name") != name:
        raise ValueError(f"it holds the state of {counters.get('name')}, the config says {name}")
    _check(counters, optimizer.moved)
    numbers = {name: index for index, name in enumerate(_names(net, trainer))}
    named = {key.rpartition(".")[0] for key in arrays}
    unknown = sorted({*named, *counters["update_counts"]} - numbers.keys())
    if unknown:
        raise ValueError(
            f"its optimizer has a parameter {show(unknown[0])}, which this net has not"
        )
    for name in sorted(named):
        for place, array in enumerate(optimizer_arrays(trainer, numbers[name])):
            saved = arrays.get(f"{name}.{place}")
            if saved is None or (saved.shape, saved.dtype) != (array.shape, array.dtype):
                raise ValueError(f"its optimizer arrays do not fit {name}")
            saved.copyto(array)
    optimizer.num_update = counters["num_update"]
    counts = {numbers[name]: count for name, count in counters["update_counts"].items()}
    update_counts(trainer).clear()
    update_counts(trainer).update(counts)
    for number, value in counters["numbers"].items():
        setattr(optimizer, number, value)


def _check(counters: Dict[str, Any], moved: List[str]) -> None:
    counts, numbers = counters.get("update_counts"), counters.get("numbers")
    if not (
        isinstance(counts, dict)
        and all(type(n) is int and n >= 0 for n in (counters.get("num_update"), *counts.values()))
        and isinstance(numbers, dict)
        and numbers.keys() <= set(moved)
        and all(isinstance(n, (int, float, type(None))) for n in numbers.values())
    ):
        raise ValueError("its optimizer's counters are not those of an optimizer")


def broadcast(net: gluon.Block, trainer: gluon.Trainer) -> None:
    """Give every rank's optimizer rank 0's state; Horovod does this for Torch, not for MXNet.
    Raises ConfigError for a parameter that could not be saved.
    """
    numbers = {name: index for index, name in enumerate(_names(net, trainer))}
    if dist.world_size() == 1:
        return
    arrays, counters = read(net, trainer)
    keys, counters = dist.broadcast_object((sorted(arrays), counters))
    for key in keys:
        name, _, place = key.rpartition(".")
        array = optimizer_arrays(trainer, numbers[name])[int(place)]
        dist.broadcast_array(array, f"optimizer.{key}").copyto(array)
    write(net, trainer, {}, counters)


def _names(net: gluon.Block, trainer: gluon.Trainer) -> List[str]:
    """The net's own name for each of the trainer's parameters.

    Neither Gluon's global names nor the order in the trainer, which sorts by them, would do: both
    depend on how many layers the process has made before.
    """
    names = {id(p): name for name, p in structural_parameters(net).items()}
    for parameter in all_parameters(trainer):
        if id(parameter) not in names:
            raise ConfigError(
                f"parameter {parameter.name} is no attribute of its block, so that Gluon would "
                "not save it; write self.NAME = self.params.get(...)"
            )
    return [names[id(parameter)] for parameter in all_parameters(trainer)]

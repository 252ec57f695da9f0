"""What an optimizer remembers: its arrays and counters, out of it, into it, and over ranks."""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

import mxnet as mx
from mxnet import gluon

from . import dist
from .settings import show

Arrays = Dict[str, mx.nd.NDArray]  # by "parameter number.place in its state"

# What an optimizer carries from step to step beside its arrays: Nadam's product of momenta.
_NUMBERS = ("m_schedule",)


def read(trainer: gluon.Trainer) -> Tuple[Arrays, Dict[str, Any]]:
    """The arrays (momenta and the like), and the counters as JSON can hold them."""
    optimizer = trainer.optimizer
    arrays = {
        f"{index}.{place}": array
        for index, state in trainer._updaters[0].states.items()
        for place, array in enumerate(_flat(state))
    }
    counters = {
        "name": type(optimizer).__name__,
        "num_update": optimizer.num_update,
        "index_update_count": {str(k): v for k, v in optimizer._index_update_count.items()},
        "numbers": {
            name: getattr(optimizer, name) for name in _NUMBERS if hasattr(optimizer, name)
        },
    }
    return arrays, counters


def write(trainer: gluon.Trainer, arrays: Arrays, counters: Dict[str, Any]) -> None:
    """Have the optimizer go on from what :func:`read` gave.

    Raises:
        ValueError: it is another optimizer, or its parameters have other shapes.
    """
    optimizer = trainer.optimizer
    name = type(optimizer).__name__
    if counters.get("name") != name:
        raise ValueError(f"it holds the state of {counters.get('name')}, the config says {name}")
    _check_counters(trainer, counters)
    for index in sorted({_index(trainer, key.split(".")[0]) for key in arrays}):
        for place, array in enumerate(_flat(_state(trainer, index))):
            saved = arrays.get(f"{index}.{place}")
            if saved is None or (saved.shape, saved.dtype) != (array.shape, array.dtype):
                parameter = trainer._params[index].name
                raise ValueError(f"its optimizer arrays do not fit {parameter}")
            saved.copyto(array)
    optimizer.num_update = counters["num_update"]
    counts = {int(k): v for k, v in counters["index_update_count"].items()}
    optimizer._index_update_count.clear()
    optimizer._index_update_count.update(counts)
    for number, value in counters["numbers"].items():
        setattr(optimizer, number, value)


def _check_counters(trainer: gluon.Trainer, counters: Dict[str, Any]) -> None:
    counts, numbers = counters.get("index_update_count"), counters.get("numbers")
    if not (
        isinstance(counts, dict)
        and all(type(n) is int and n >= 0 for n in (counters.get("num_update"), *counts.values()))
        and isinstance(numbers, dict)
        and all(name in _NUMBERS and isinstance(n, float) for name, n in numbers.items())
    ):
        raise ValueError("its optimizer's counters are not those of an optimizer")
    for index in counts:
        _index(trainer, index)


def _index(trainer: gluon.Trainer, text: str) -> int:
    """The number of a parameter, as a checkpoint names it."""
    if not text.isdecimal() or int(text) >= len(trainer._params):
        raise ValueError(f"its optimizer has a parameter {show(text)}, which this net has not")
    return int(text)


def broadcast(trainer: gluon.Trainer) -> None:
    """Give every rank's optimizer rank 0's state; Horovod does this for Torch, not for MXNet."""
    if dist.world_size() == 1:
        return
    arrays, counters = read(trainer)
    names = dist.broadcast_object(sorted(arrays))
    for name in names:
        index, place = map(int, name.split("."))
        array = _flat(_state(trainer, index))[place]
        dist.broadcast_array(array, f"optimizer.{name}").copyto(array)
    write(trainer, {}, dist.broadcast_object(counters))


def _state(trainer: gluon.Trainer, index: int) -> Any:
    """The state of a parameter, made where the optimizer has not stepped yet."""
    updater = trainer._updaters[0]
    if index not in updater.states:
        weight = trainer._params[index].list_data()[0]
        updater.states[index] = trainer.optimizer.create_state_multi_precision(index, weight)
        updater.states_synced[index] = True
    return updater.states[index]


def _flat(state: Any) -> List[mx.nd.NDArray]:
    """The arrays in one parameter's state: None, an array, or nested tuples of these."""
    if state is None:
        return []
    if isinstance(state, (list, tuple)):
        return [array for item in state for array in _flat(item)]
    return [state]

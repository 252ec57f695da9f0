"""Settings: dataclass fields with a meaning and bounds, validated on construction.

Every error is one line (:class:`ConfigError`): what was given and what is allowed.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import operator
import os
import re
import typing
from dataclasses import field
from typing import Any, Callable, Dict, Mapping, Sequence, Tuple

from ..errors import ConfigError, nearest, show

# A bound's name -> its sign and its words, and whether a number keeps to it.
BOUNDS: Dict[str, Tuple[str, str, Callable[[Any, Any], bool]]] = {
    "minimum": (">=", "at least", operator.ge),
    "maximum": ("<=", "at most", operator.le),
    "above": (">", "above", operator.gt),
    "below": ("<", "below", operator.lt),
}


def setting(
    default: Any,
    meaning: str,
    *,
    choices: Sequence[Any] = (),
    path: bool = False,
    named: Mapping[str, Any] = {},
    **bounds: float,
) -> Any:
    """A dataclass field with its meaning and bounds as metadata.

    In a ``path``, ``~`` and environment variables are expanded; values that are ``named`` may be
    given by name; ``bounds`` of numbers, by the names in ``BOUNDS``, hold for each element.
    """
    assert bounds.keys() <= BOUNDS.keys()
    metadata = {"meaning": meaning, "choices": choices, "path": path, "named": named}
    metadata["bounds"] = bounds
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Checked:
    """Base of settings dataclasses: converts and validates every field on construction."""

    _section = ""

    def __init_subclass__(cls, section: str = "") -> None:
        cls._section = section

    def __post_init__(self) -> None:
        types = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            name, kind = self._section + item.name, types[item.name]
            value = getattr(self, item.name)
            if not dataclasses.is_dataclass(kind):
                if isinstance(value, str):
                    value = item.metadata["named"].get(value.lower(), value)
                value = _convert(name, kind, value)
                _check_bounds(name, item.metadata, value)
                if item.metadata["path"] and value is not None:
                    value = _expanded(name, value)
                object.__setattr__(self, item.name, value)  # the dataclass is frozen
            elif not isinstance(value, types[item.name]):
                raise ConfigError(
                    f"{name} is {show(value)}; it must be {types[item.name].__name__}(...), or "
                    "make the config of a mapping, by trainer.config.from_dict"
                )


_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{(\w+)\})")


def _expanded(name: str, path: str) -> str:
    """A path with ``~``, ``$VARIABLE`` and ``${VARIABLE}`` expanded; raises ConfigError."""
    for variable in map("".join, _VARIABLE.findall(path)):
        if not os.environ.get(variable):
            raise ConfigError(
                f"{name} is {show(path)}; the environment variable {variable} is not set or empty"
            )
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~"):
        raise ConfigError(
            f"{name} is {show(path)}; there is no such home folder. A folder of that name in the "
            f"current one is ./{expanded}"
        )
    return expanded


def plain(value: Any) -> Any:
    """``value`` with tuples as lists, as in JSON and YAML."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def flat(values: Mapping[str, Any], prefix: str = "", whole: Sequence[str] = ()) -> Dict[str, Any]:
    """Nested settings by their dotted names; those that are ``whole`` hold a mapping."""
    found: Dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        inner = isinstance(value, dict) and name not in whole
        found.update(flat(value, f"{name}.", whole) if inner else {name: value})
    return found


_NAMES = (int, datetime.date)  # not float: 0.10 would lose its zero

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")


def _convert(name: str, kind: Any, value: Any) -> Any:
    """``value`` converted to the annotated type; raises ConfigError."""
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays
        value = value.tolist()
    arguments = typing.get_args(kind)
    if type(None) in arguments:
        if value is None:
            return None
        kind = next(a for a in arguments if a is not type(None))
    elif typing.get_origin(kind) is typing.Union:  # of one number and several
        kind = arguments[not _NUMBER.match(str(value))]
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
        if value is None or (
            kind is not str and isinstance(value, str) and not _NUMBER.match(value)
        ):
            wanted = "texts, e.g. [csv], or []" if kind is str else "numbers, e.g. [0.5, 2]"
            raise ConfigError(f"{name} is {show(value)}; it must be a list of {wanted}")
        if kind is str and isinstance(value, str):
            value = [word.strip() for word in value.split(",")]
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(name, kind, item) for item in items)
    if typing.get_origin(kind) is dict:
        if isinstance(value, dict) and _is_plain(value):
            return dict(value)
        raise ConfigError(
            f"{name} is {show(value)}; it must be a mapping of names to plain values "
            "(numbers, texts, lists, mappings), e.g. {stem: small}"
        )
    if kind is float and isinstance(value, str) and _NUMBER.match(value):
        value = float(value)  # YAML 1.1 reads 1e-4 as a string
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf  # refused below as not finite
    if kind is str and isinstance(value, _NAMES) and not isinstance(value, bool):
        value = str(value)  # Config(name=2024)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ConfigError(f"{name} is {show(value)}; it must be {kinds[kind]}")
    if kind is str and "\0" in value:
        raise ConfigError(f"{name} is {show(value)}; it must hold no NUL character")
    return value


def _is_plain(value: Any) -> bool:
    """Whether ``value`` survives a round trip through JSON, and so through a checkpoint."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == plain(value))
    except (TypeError, ValueError, RecursionError):  # a date, a NaN, a recursive mapping
        return False


def _check_bounds(name: str, bounds: Mapping[str, Any], value: Any) -> None:
    if value is None:
        return
    for item in value if isinstance(value, tuple) else (value,):
        if bounds["choices"] and item not in bounds["choices"]:
            known = [str(choice) for choice in bounds["choices"]]
            one_of = f"one of {', '.join(known)}{nearest(str(item), known)}"
            raise ConfigError(f"{name} is {show(item)}; it must be {one_of}")
        if isinstance(item, float) and not math.isfinite(item):
            raise ConfigError(f"{name} is {show(item)}; it must be a finite number")
        for bound, limit in bounds["bounds"].items():
            _, words, holds = BOUNDS[bound]
            if not holds(item, limit):
                raise ConfigError(f"{name} is {show(item)}; it must be {words} {limit}")

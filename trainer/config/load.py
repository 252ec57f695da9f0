"""A run's config from a YAML file or a mapping, with overrides on top, and back."""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import yaml

from ..errors import ConfigError, nearest, show
from . import together, typed
from .schema import ANY_LENGTH, MAPPINGS, REMOVED, Config, decides_result
from .settings import flat, plain

PRESETS = Path(__file__).with_name("presets")  # in a clone, a link to its configs/
_OF_SITES = ("site.yaml", "site-example.yaml")  # beside presets, for `launch slurm`


def presets() -> List[str]:
    """The names of the presets that come with the trainer."""
    return [Path(name).stem for name in _configs_in(PRESETS)]


def find(given: str) -> str:
    """The path of the config file that ``given`` means: of a preset by its name, or its own.

    Whatever has a folder or a suffix (``./mine``, ``mine.yaml``) is a path. A bare word is a
    preset, so that a file in the current folder never takes its place unnoticed. Raises
    ConfigError: there is no such preset; a similar one, or a similar file, is suggested.
    """
    names = presets()
    if given != Path(given).stem:
        return given
    if given in names:
        return str(PRESETS / f"{given}.yaml")
    meant = nearest(given, [*names, *_configs_in(Path())])
    if os.path.isfile(given):
        meant = f"; did you mean the file ./{given}?"
    raise ConfigError(
        f"no preset {show(given)}{meant}; there are: {', '.join(names)}; a file's name needs its "
        "suffix, or a folder before it"
    )


def _configs_in(folder: Path) -> List[str]:
    """The config files in ``folder``; not those of Slurm sites, which lie beside them."""
    found = sorted(str(path) for path in folder.glob("[!.]*.yaml"))
    return [path for path in found if Path(path).name not in _OF_SITES]


def read_file(path: str) -> Dict[str, Any]:
    """The settings in a file, as plain values. Raises ConfigError: as :func:`_read`; or a value is
    not clear.
    """
    return dict(typed.plain(_read(path), f"config file {path}"))


def _read(path: str) -> Dict[Any, Any]:
    """The settings in a file; numbers and flags as :class:`typed.Typed`. Raises ConfigError: it is
    missing (similar names are suggested), unreadable, or no mapping.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        nearby = _configs_in(Path(path).parent)
        meant = nearest(path, nearby) or nearest(Path(path).stem, presets())
        there = f"there are: {', '.join(nearby)}" if nearby else f"presets: {', '.join(presets())}"
        raise ConfigError(f"no config file {path}{meant}; {there}") from None
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    values = typed.parse(content, f"config file {path}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = type(typed.plain(values, f"config file {path}")).__name__
        raise ConfigError(f"config file {path} holds a {kind}; it must hold `setting: value` lines")
    return values


def override(values: Dict[str, Any], text: str) -> None:
    """Put ``section.setting=value`` into ``values``, of whose sections it takes copies. Raises
    ConfigError: it is malformed.
    """
    name, equals, value_text = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"override {text!r} must read setting=value, e.g. optimizer.lr=0.1")
    value = typed.parse(value_text, f"the value of override {show(text)}")
    *sections, leaf = name.strip().split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, (dict, type(None))):
            raise ConfigError(f"override {text!r}: {section} is a setting, not a section")
        values[section] = inner = dict(inner or {})  # its own: aliases in YAML share one
        values = inner
    values[leaf] = value


def load(path: Optional[str] = None, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file or preset (:func:`find`), ``section.setting=value`` on top. Raises
    ConfigError: for whatever is wrong, in one line.
    """
    values: Dict[str, Any] = {}
    if path is not None:
        file = find(os.fspath(path))
        values = _read(file)
        values.setdefault("name", Path(file).stem)
    return from_dict(values, overrides)


def names_run(path: Optional[str], overrides: Sequence[str]) -> bool:
    """Whether a file or an override gives the run its name, which is the file's own otherwise."""
    named = any(text.partition("=")[0].strip() == "name" for text in overrides)
    return named or (path is not None and "name" in _read(find(path)))


def from_dict(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The config of a nested mapping; settings it leaves out have their defaults."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"a config is {show(values)}; it must be a mapping (load reads files)")
    chosen = dict(values)
    for text in [overrides] if isinstance(overrides, str) else overrides:
        override(chosen, text)
    return _build(Config, chosen, prefix="")


def to_dict(config: Config) -> Dict[str, Any]:
    """Every setting as a nested dict, for :func:`from_dict`."""
    return plain(dataclasses.asdict(config))


def recorded(values: Mapping[str, Any]) -> Dict[str, Any]:
    """The nested mapping in a checkpoint, for :func:`from_dict`: without what there is no more, or
    does nothing beside the others.
    """
    known = flat(values, whole=MAPPINGS)
    idle = {
        name
        for name, (other, *used_with) in together.ONLY_WITH.items()
        if str(known.get(other, used_with[0])).lower() not in used_with
    }
    return {
        section: {k: v for k, v in inner.items() if f"{section}.{k}" not in {*REMOVED, *idle}}
        if isinstance(inner, dict)
        else inner
        for section, inner in values.items()
    }


def as_yaml(config: Config) -> str:
    """Every setting as YAML, for :func:`load`."""
    return yaml.dump(to_dict(config), Dumper=typed.Dumper, sort_keys=False)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> List[str]:
    """The differences that influence the result, as ``setting: old -> new``.

    A setting missing from ``before``, written by an older version, counts as the default.
    """
    old = {**flat(to_dict(Config()), whole=MAPPINGS), **flat(before, whole=MAPPINGS)}
    new = flat(after, whole=MAPPINGS)
    free = []
    if all(values["schedule.name"] in ANY_LENGTH for values in (old, new)):
        free.append("train.epochs")
    weights = [str(values["model.weights"]) for values in (old, new)]
    if os.path.basename(weights[0]) == os.path.basename(weights[1]):
        free.append("model.weights")  # moved at most: a digest tells whether they are others
    found: List[str] = []
    for name in sorted({*old, *new}):
        was, now = old.get(name), new.get(name)
        if was != now and name not in free and decides_result(name):
            shown = name if name.isprintable() else repr(name)
            found.append(f"{shown}: {show(was)} -> {show(now)}")
    return found


def _build(cls: Any, values: Any, prefix: str) -> Any:
    types = typing.get_type_hints(cls)
    known = ", ".join(f.name for f in dataclasses.fields(cls))
    section = prefix.rstrip(".") or "a config"
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{section} is {show(typed.plain(values, section))}; it is a section and holds {known}"
        )
    chosen = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in REMOVED:
            raise ConfigError(f"there is no setting {name} any more: {REMOVED[name]}")
        if key not in types:
            shown = name if name.isprintable() else repr(name)
            raise ConfigError(f"unknown setting {shown}{_meant(name)}; {section} holds {known}")
        if dataclasses.is_dataclass(types[key]):
            value = _build(types[key], {} if value is None else value, f"{name}.")
        elif isinstance(value, typed.Typed) and str in (types[key], *typing.get_args(types[key])):
            value = value.text
        elif isinstance(value, typed.Typed) and types[key] is bool:
            value = value.value  # also of on, off, yes and no
        else:
            value = typed.plain(value, name)
        chosen[key] = value
    return cls(**chosen)


def _meant(name: str) -> str:
    """A suggestion, for a message, of what an unknown ``name`` was meant to be."""
    known = all_settings()
    if name in known:  # a dotted name at the top of a file
        section, _, leaf = name.partition(".")
        return f"; in a file it reads `{section}: {{{leaf}: ...}}`"
    meant = similar(name)
    if meant:
        return f"; did you mean {' or '.join(meant)}?"
    return nearest(name, [*(f.name for f in dataclasses.fields(Config)), *known])


def similar(name: str) -> List[str]:
    """The settings, three at most, that ``name`` is or is the end of, as ``batch_size``."""
    known = all_settings()
    clear = [k for k in (name, f"train.{name}", f"optimizer.{name}") if k in known]
    end = f"_{name}".replace(".", "_")
    ending = [k for k in known if f"_{k}".replace(".", "_").endswith(end)]
    return clear[:1] or sorted(ending, key=len)[:3]


def all_settings() -> List[str]:
    """The dotted name of every setting of a run."""
    return list(flat(to_dict(Config()), whole=MAPPINGS))

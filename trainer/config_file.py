"""Reading YAML files and ``section.setting=value`` overrides into nested mappings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import yaml

from .settings import ConfigError, nearest, show


def read(path: str) -> Dict[str, Any]:
    """The settings in a file.

    Raises:
        ConfigError: it is missing (similar names are suggested), unreadable, or no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        nearby = sorted(str(p) for p in Path(path).parent.glob("*.yaml"))
        raise ConfigError(
            f"no config file {path}{nearest(path, nearby)}"
            + (f"; there are: {', '.join(nearby)}" if nearby else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    values = _parse(text, f"config file {path}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"config file {path} holds a {type(values).__name__}; "
            "it must hold `setting: value` lines"
        )
    return values


def override(values: Dict[str, Any], text: str) -> None:
    """Put ``section.setting=value`` into ``values``.

    Raises:
        ConfigError: it is malformed.
    """
    name, equals, value_text = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"override {text!r} must read setting=value, e.g. optimizer.lr=0.1")
    value = _parse(value_text, f"the value of override {show(text)}")
    *sections, leaf = name.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {text!r}: {section} is a setting, not a section")
        values = inner
    values[leaf] = value


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [name for index, name in enumerate(names) if name in names[:index]]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"it has {twice[0]} twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    # PyYAML leaks other errors where a value does not fit its tag, or is nested too deeply.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{what} is not YAML: {' '.join(str(error).split())}") from None

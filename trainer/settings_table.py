"""Makes docs/configuration.md from the settings: ``python -m trainer.settings_table``."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, List

from .config import Config

HEAD = """# Configuration

A run is described by a YAML file (see `configs/`) that holds what differs from these defaults;
`section.setting=value` on the command line goes on top. `python -m trainer config FILE` checks a
file and shows the result. This page is made by `python -m trainer.settings_table`.
"""

_SYMBOLS = (("minimum", ">="), ("maximum", "<="), ("above", ">"), ("below", "<"))


def as_markdown() -> str:
    """Every setting with its default, its bounds and its meaning."""
    config = Config()
    fields = dataclasses.fields(config)
    plain = [f for f in fields if not dataclasses.is_dataclass(getattr(config, f.name))]
    parts = [HEAD, "## The run", _table(config, plain, "")]
    for field in fields:
        section = getattr(config, field.name)
        if dataclasses.is_dataclass(section):
            parts += [f"## {field.name}", str(type(section).__doc__)]
            parts.append(_table(section, dataclasses.fields(section), f"{field.name}."))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(section: Any, fields: Any, prefix: str) -> str:
    rows: List[str] = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for field in fields:
        default = getattr(section, field.name)
        shown = json.dumps(default).strip('"')
        allowed = _allowed(field.metadata)
        rows.append(
            f"| `{prefix}{field.name}` | `{shown}` | {field.metadata['meaning']}{allowed} |"
        )
    return "\n".join(rows)


def _allowed(bounds: Any) -> str:
    words = [f"one of {', '.join(bounds['choices'])}"] if bounds["choices"] else []
    for name, symbol in _SYMBOLS:
        if bounds[name] is not None:
            words.append(f"{symbol} {bounds[name]}")
    return f" ({'; '.join(words)})" if words else ""


if __name__ == "__main__":
    print(as_markdown(), end="")

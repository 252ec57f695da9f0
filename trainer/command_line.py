"""What the commands of ``python -m trainer`` have in common."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any, Iterator, Tuple

import click

from . import device, launched
from .config import Config, load

configured = click.argument("config", required=False, type=click.Path())
overridden = click.argument("overrides", nargs=-1)


def alone(command: str) -> None:
    """Refuse to be one of several ranks."""
    if launched.size() > 1:
        raise click.UsageError(f"{command} runs on one process: leave the launcher out")


@contextlib.contextmanager
def writing(what: Any) -> Iterator[None]:
    """That ``what`` cannot be written is the user's to mend."""
    try:
        yield
    except OSError as error:
        place = error.filename or what
        raise click.UsageError(f"{place} cannot be written: {error.strerror}") from error


def show(what: Any) -> None:
    """Print a table, as wide as it must be where nobody watches, or anything else as JSON."""
    from rich.console import Console
    from rich.table import Table

    if isinstance(what, Table):
        Console(width=None if sys.stdout.isatty() else 200).print(what, highlight=False)
    else:
        click.echo(json.dumps(what, indent=1))


def split(config: Any, overrides: Tuple[str, ...]) -> Tuple[Any, Tuple[str, ...]]:
    """The config's file, if any, and the overrides: the first word may read like one."""
    return (None, (config, *overrides)) if config and "=" in config else (config, overrides)


def load_config(config: Any, overrides: Tuple[str, ...]) -> Config:
    """The settings of a command, checked; then the cores are divided, before MXNet is loaded."""
    settings = load(*split(config, overrides))
    device.share_cores()
    return settings


def load_saved(checkpoint: str, overrides: Tuple[str, ...]) -> Any:
    """The model of a checkpoint, as ``saved.Saved``; the cores are divided first."""
    device.share_cores()
    from . import saved

    return saved.load(checkpoint, overrides)

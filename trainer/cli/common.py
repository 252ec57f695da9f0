"""Helpers of the commands of ``python -m trainer``."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Iterator, Optional, Tuple

import click

from ..config import Config, load
from ..console import answer
from ..dist import device, environment

configured = click.argument("config", required=False, type=click.Path())
overridden = click.argument("overrides", nargs=-1)
other_weights = click.option(
    "--params", type=click.Path(dir_okay=False), help="Take the weights of this file (calibrate's)."
)
trusting = click.option(
    "--trust", is_flag=True, help="Run the function, of whatever code, that makes CHECKPOINT's net."
)


def alone(command: str) -> None:
    """Refuse to run as one of several ranks."""
    environment.check()
    if environment.size() > 1:
        raise click.UsageError(f"{command} runs on one process: leave the launcher out")


@contextlib.contextmanager
def writing(what: Any) -> Iterator[None]:
    """Turn an OSError within it into a usage error: ``what`` cannot be written."""
    try:
        yield
    except OSError as error:
        place = error.filename or what
        raise click.UsageError(f"{place} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def written(path: Optional[str]) -> Iterator[Optional[Path]]:
    """A temporary file that replaces ``path`` on success; None if ``path`` is None."""
    if path is None:
        yield None
        return
    from ..checkpoint import whole_file  # late: that room loads MXNet

    with writing(path), whole_file.replaced(Path(path)) as partial:
        yield partial


def table_width() -> int:
    """Characters in a row of a table; wide where the output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 200


def show(what: Any) -> None:
    """Answer with a rich Table as such, with anything else as JSON."""
    from rich.console import Console
    from rich.table import Table

    if isinstance(what, Table):
        console = Console(width=table_width(), color_system=None, markup=False, emoji=False)
        with console.capture() as shown:
            console.print(what, highlight=False)
        answer(shown.get().rstrip("\n"))
    else:
        answer(json.dumps(what, indent=1))


def split(config: Any, overrides: Tuple[str, ...]) -> Tuple[Any, Tuple[str, ...]]:
    """The config file, if any, and the overrides, which may begin in the first word."""
    return (None, (config, *overrides)) if config and "=" in config else (config, overrides)


def load_config(config: Any, overrides: Tuple[str, ...]) -> Config:
    """The validated config of a command; also assigns cores, before MXNet is loaded."""
    settings = load(*split(config, overrides))
    device.share_cores()
    return settings


def load_saved(
    checkpoint: str, overrides: Tuple[str, ...], trust: bool, params: Optional[str] = None
) -> Any:
    """The model of a checkpoint, a ``saved.Saved``; assigns cores first."""
    device.share_cores()
    from ..inference import trained_model

    return trained_model.load(checkpoint, overrides, params=params, trust=trust)

"""Helpers of the commands of ``python -m trainer``."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import click

from ..config import Config, all_settings, load, table
from ..config.load import similar
from ..dist import device, environment


class Configured(click.Command):
    """A command that takes settings: ``--lr 0.1`` is told what to type.

    One that takes a config lists all settings in its help.
    """

    def parse_args(self, ctx: click.Context, args: List[str]) -> List[str]:
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(_told(error, words)) from None

    def format_epilog(self, ctx: click.Context, formatter: Any) -> None:
        """List the settings with their defaults, in the groups of docs/configuration.md."""
        lists = any(parameter.name == "config" for parameter in self.params)
        for title, about, rows in table.sections() if lists else ():
            with formatter.section(f"Settings: {title}"):
                if about:
                    formatter.write_text(about)
                formatter.write_dl([(f"{name}={default}", text) for name, default, text in rows])


def _told(error: click.NoSuchOption, words: Sequence[str]) -> str:
    """The error's text; the settings that an option may have meant, with the value given."""
    at = next(i for i, word in enumerate(words) if word.startswith(error.option_name))
    given, equals, value = words[at].partition("=")
    following = "".join(words[at + 1 : at + 2])
    if not equals:
        value = "..." if following.startswith("-") or "=" in following else following or "..."
    meant = similar(given.strip("-").replace("-", "_"))
    if not meant:
        return f"{error.format_message()}; --help lists options and settings"
    settings = " or ".join(f"{name}={value}" for name in meant)
    return f"there is no option {given}; a setting is given without dashes: {settings}"


overridden = click.argument("overrides", nargs=-1, metavar="[SETTING=VALUE]...")


def of_run(argument: str) -> Any:
    """An argument that names a run or a checkpoint, see :func:`in_runs`."""
    return click.argument(argument, type=click.Path(), callback=lambda *given: in_runs(given[2]))


def configured(command: Any) -> Any:
    """The arguments of a command on a run to be made: a config, if any, and settings on top."""
    return click.argument("config", required=False, type=click.Path())(overridden(command))


def of_model(command: Any) -> Any:
    """The arguments and options of a command on a trained model, for :func:`load_saved`."""
    return of_run("checkpoint")(overridden(other_weights(trusting(command))))


def in_runs(given: str) -> str:
    """A path, or the name of a run in the default folder of runs, as a path."""
    inside = os.path.join(Config().output, given)
    return inside if not os.path.exists(given) and os.path.isdir(inside) else given


def in_run_of(checkpoint: Path, name: str) -> Path:
    """The default place of what is made of a checkpoint: in its run's folder. Raises UsageError:
    the checkpoint is in none.
    """
    folder = checkpoint.resolve().parent
    if folder.name != "checkpoints":
        raise click.UsageError(f"{checkpoint} is in no run's folder: say where, by --output")
    return folder.parent / name


other_weights = click.option(
    "--params", type=click.Path(dir_okay=False), help="Weights to use instead (see calibrate)."
)
trusting = click.option(
    "--trust", is_flag=True, help="Run whatever code CHECKPOINT names to make its net."
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


def split(config: Any, overrides: Tuple[str, ...]) -> Tuple[Any, Tuple[str, ...]]:
    """The config file, if any, and the overrides, which may begin in the first word."""
    is_setting = "=" in (config or "") or config in all_settings()
    named = not is_setting or os.path.exists(config)
    return (config, overrides) if named else (None, (config, *overrides))


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

"""The command line of a rank: ``python -m trainer COMMAND``."""

from __future__ import annotations

import os
import sys
from typing import Any, Tuple

import click

from . import config as config_module
from . import device, dist

USER_ERROR = 2

configured = click.argument("config", required=False, type=click.Path())
overridden = click.argument("overrides", nargs=-1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Data-parallel training of Gluon nets. CONFIG is a YAML file; SETTING=VALUE goes on top."""


@main.command()
@configured
@overridden
@click.option("--resume", default="auto", help="auto, none, or the checkpoint to go on from.")
@click.option("--force", is_flag=True, help="Resume although settings of the run have changed.")
def train(config: str, overrides: Tuple[str, ...], resume: str, force: bool) -> None:
    """Train on every rank the launcher started, or on this process alone."""
    settings = _load(config, overrides)
    from .loop import fit
    from .preemption import EXIT_CODE

    result = fit(config=settings, resume=resume, force=force)
    dist.shutdown()
    if result.stopped:
        sys.exit(EXIT_CODE)
    if dist.launched_rank() == 0:
        click.echo(f"look at it:  tensorboard --logdir {settings.output}")


@main.command()
@configured
@overridden
def summary(config: str, overrides: Tuple[str, ...]) -> None:
    """Show the net's layers, shapes, parameters and FLOPs (data.image_size=224: the seed's)."""
    settings = _load(config, overrides)
    import mxnet as mx

    from . import model
    from . import summary as layers

    net = model.build(settings.model)
    net.initialize()
    side = settings.data.image_size or 28
    click.echo(layers.as_text(layers.summarize(net, mx.nd.zeros((1, 1, side, side)))))


@main.command()
@configured
@overridden
def config(config: str, overrides: Tuple[str, ...]) -> None:
    """Check a config and show it with every default."""
    click.echo(config_module.as_yaml(_load(config, overrides)), nl=False)


def _load(config: Any, overrides: Tuple[str, ...]) -> config_module.Config:
    """The config; the first word is an override where it reads like one."""
    if config and "=" in config:
        config, overrides = None, (config, *overrides)
    settings = config_module.load(config, overrides)
    device.limit_threads()
    return settings


def run() -> None:
    """Enter here: errors of the user end in one line on rank 0, others also say whose they are."""
    try:
        main(standalone_mode=False)
    except (click.ClickException, ValueError) as error:
        # ConfigError, DataError and CheckpointError: alike on all ranks, so one of them tells.
        if dist.launched_rank() == 0:
            text = error.format_message() if isinstance(error, click.ClickException) else str(error)
            click.echo(f"error: {text}", err=True)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    run()

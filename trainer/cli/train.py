"""The commands that make and inspect runs: train, bench, summary, config, runs, compare."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Optional, Tuple

import click

from .. import config as config_module
from .. import dist
from ..config.load import names_run
from ..console import answer, print_line
from ..dist import environment
from .common import Configured, alone, configured, load_config, split, writing, written


@click.command(cls=Configured)
@configured
@click.option("--resume", default="auto", help="auto, none, or the checkpoint to resume from.")
@click.option("--force", is_flag=True, help="Resume although settings of the run have changed.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="Short for monitor.log_format=...: what rank 0 prints.",
)
def train(
    config: str, overrides: Tuple[str, ...], resume: str, force: bool, log_format: Optional[str]
) -> None:
    """Train on all ranks that a launcher started, or on this process alone."""
    try:
        chosen = () if log_format is None else (f"monitor.log_format={log_format}",)
        settings = load_config(config, (*overrides, *chosen))
        log_format = settings.monitor.log_format
        environment.outlive_peers()
        if environment.rank() == 0 and log_format == "text":
            print_line("starting: loading MXNet")
        from ..dist.preemption import EXIT_CODE
        from ..run.loop import fit

        numbered = not names_run(*split(config, overrides))
        result = fit(config=settings, resume=resume, force=force, numbered=numbered)
    except Exception as error:
        if log_format == "json" and environment.rank() == 0:
            from ..report.progress import json_line

            print_line(json_line("error", {"message": str(error)}))
        raise
    dist.shutdown()
    if result.stopped:
        sys.exit(EXIT_CODE)


@click.command(cls=Configured)
@configured
@click.option("--steps", type=click.IntRange(min=2), default=30, show_default=True)
@click.option("--warmup", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write figures there.")
@click.option(
    "--timeline",
    "--traces",  # horovodrun stumbles over --timeline, wherever it stands
    type=click.Path(file_okay=False),
    help="Folder for traces of a few steps in Chrome's format (under horovodrun: --traces).",
)
def bench(
    config: str,
    overrides: Tuple[str, ...],
    steps: int,
    warmup: int,
    json_path: Optional[str],
    timeline: Optional[str],
) -> None:
    """Benchmark the run that CONFIG describes: throughput, time breakdown of a step, memory.

    It writes nothing but what is asked for.
    """
    settings = load_config(config, overrides)
    if timeline is not None:
        with writing(timeline):
            os.makedirs(timeline, exist_ok=True)
    # Fails before the measurement, not after it, if the results cannot be written.
    with written(json_path if environment.rank() == 0 else None) as file:
        from ..run import bench, bench_table

        figures = bench.measure(settings, steps, warmup, Path(timeline) if timeline else None)
        dist.shutdown()
        if file is not None:
            found = bench_table.as_dict(settings, figures)
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if environment.rank() == 0:
        text = bench_table.as_text(settings, figures)
        (answer if json_path is None else print_line)(text)


@click.command(cls=Configured)
@configured
@click.option("--channels", type=click.IntRange(min=1), help="Default: 1; of pictures, as read.")
def summary(config: str, overrides: Tuple[str, ...], channels: Optional[int]) -> None:
    """Show the net's layers, shapes, parameters and FLOPs."""
    alone("summary")
    settings = load_config(config, overrides)
    import mxnet as mx

    from .. import model
    from ..data import input_pipeline
    from ..model import prepare
    from ..model import summary as layers

    net = model.build(settings.model, seed=settings.seed)
    side = settings.data.image_size
    channels = channels or (settings.data.channels if settings.data.of_pictures else 1)
    height, width = (side, side) if side else input_pipeline.image_size(settings.data)
    answer(layers.as_text(prepare.prepare_net(net, settings, (channels, height, width), mx.cpu())))


@click.command(cls=Configured)
@configured
def config(config: str, overrides: Tuple[str, ...]) -> None:
    """Check a config and print it with all defaults."""
    answer(config_module.as_yaml(load_config(config, overrides)).rstrip("\n"))

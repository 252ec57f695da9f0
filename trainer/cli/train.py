"""The commands that make and inspect runs: train, bench, summary, config, runs, compare."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Optional, Tuple

import click

from .. import config as config_module
from .. import dist
from ..console import answer, print_line
from ..dist import environment
from .common import (
    alone,
    configured,
    load_config,
    overridden,
    split,
    writing,
    written,
)


@click.command()
@configured
@overridden
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
        from ..dist.preemption import EXIT_CODE
        from ..run.loop import fit

        result = fit(config=settings, resume=resume, force=force)
    except Exception as error:
        if log_format == "json" and environment.rank() == 0:
            from ..report.progress import json_line

            print_line(json_line("error", {"message": str(error)}))
        raise
    dist.shutdown()
    if result.stopped:
        sys.exit(EXIT_CODE)


@click.command()
@configured
@overridden
@click.option("--steps", type=click.IntRange(min=2), default=30, show_default=True)
@click.option("--warmup", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write figures there.")
@click.option(
    "--timeline",
    "--traces",  # horovodrun stumbles over --timeline, wherever it stands
    type=click.Path(file_okay=False),
    help="Folder for traces of a few steps in Chrome's format (under horovodrun: --traces).",
)
@click.option("--sweep", multiple=True, metavar="SETTING=V1,V2", help="Each value; repeatable.")
@click.option("--ranks", metavar="N1,N2", help="Start that many ranks on this machine.")
def bench(
    config: str,
    overrides: Tuple[str, ...],
    steps: int,
    warmup: int,
    json_path: Optional[str],
    timeline: Optional[str],
    sweep: Tuple[str, ...],
    ranks: Optional[str],
) -> None:
    """Benchmark the run that CONFIG describes: throughput, time breakdown of a step, memory.

    On the ranks that the launcher started; or, with --ranks and --sweep, on ranks of its own, one
    combination after another. It writes nothing but what is asked for.
    """
    several = bool(sweep or ranks)
    if several:
        alone("bench with --sweep or --ranks")
        if timeline is not None:
            raise click.UsageError("--timeline goes with one bench, not with --sweep or --ranks")
    if timeline is not None:
        with writing(timeline):
            os.makedirs(timeline, exist_ok=True)
    # Fails before the measurement, not after it, if the results cannot be written.
    with written(json_path if environment.rank() == 0 else None) as file:
        found: Any
        if several:
            from ..run import bench_sweep, bench_table

            path, overrides = split(config, overrides)
            chosen = bench_sweep.combinations(sweep, ranks or "1")
            options = (f"--steps={steps}", f"--warmup={warmup}")
            found = bench_sweep.measure(path, overrides, chosen, options)
            pairs = list(zip(chosen, map(bench_table.from_dict, found)))
            text = bench_table.sweep_as_text(pairs)
        else:
            settings = load_config(config, overrides)
            from ..run import bench, bench_table

            figures = bench.measure(settings, steps, warmup, Path(timeline) if timeline else None)
            dist.shutdown()
            found = bench_table.as_dict(settings, figures)
            text = bench_table.as_text(settings, figures)
        if file is not None:
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if environment.rank() == 0:
        (answer if json_path is None else print_line)(text)


@click.command()
@configured
@overridden
@click.option("--channels", type=click.IntRange(min=1), default=1, show_default=True)
def summary(config: str, overrides: Tuple[str, ...], channels: int) -> None:
    """Show the net's layers, shapes, parameters and FLOPs."""
    alone("summary")
    settings = load_config(config, overrides)
    import mxnet as mx

    from .. import model
    from ..data import input_pipeline
    from ..model import prepare
    from ..model import summary as layers

    net = model.build(settings.model)
    side = settings.data.image_size
    height, width = (side, side) if side else input_pipeline.image_size(settings.data)
    answer(layers.as_text(prepare.prepare_net(net, settings, (channels, height, width), mx.cpu())))


@click.command()
@configured
@overridden
def config(config: str, overrides: Tuple[str, ...]) -> None:
    """Check a config and print it with all defaults."""
    answer(config_module.as_yaml(load_config(config, overrides)).rstrip("\n"))

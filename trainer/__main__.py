"""The command line of a rank: ``python -m trainer COMMAND``."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any, Iterator, Optional, Tuple

import click

from . import config as config_module
from . import console, device, dist

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
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="Short for monitor.log_format=...: what rank 0 prints.",
)
def train(
    config: str, overrides: Tuple[str, ...], resume: str, force: bool, log_format: Optional[str]
) -> None:
    """Train on every rank the launcher started, or on this process alone."""
    try:
        chosen = () if log_format is None else (f"monitor.log_format={log_format}",)
        settings = _load(config, (*overrides, *chosen))
        log_format = settings.monitor.log_format
        dist.outlive_peers()
        from .loop import fit
        from .preemption import EXIT_CODE

        result = fit(config=settings, resume=resume, force=force)
    except Exception as error:
        if log_format == "json" and dist.launched_rank() == 0:
            from .progress import json_line

            console.print_line(json_line("error", {"message": str(error)}))
        raise
    dist.shutdown()
    if result.stopped:
        sys.exit(EXIT_CODE)


@main.command()
@click.argument("checkpoint", type=click.Path())
@overridden
def evaluate(checkpoint: str, overrides: Tuple[str, ...]) -> None:
    """Look at the whole test set with the model of CHECKPOINT (or a run's folder: its best)."""
    saved = _saved(checkpoint, overrides)
    from .saved import evaluate_saved

    seen = evaluate_saved(saved)
    dist.shutdown()
    if dist.launched_rank() == 0:
        click.echo(f"{saved.path}: loss {seen.loss:.4f}  accuracy {seen.accuracy:.4f}")
        for name, share in zip(saved.class_names, seen.class_accuracy):
            click.echo(f"  {name:12} {share:.4f}")


@main.command()
@click.argument("checkpoint", type=click.Path())
@overridden
@click.option("--samples", type=click.IntRange(min=1), help="Of the training set; default: all.")
@click.option("--out", type=click.Path(), help="Default: calibrated.params in the run's folder.")
def calibrate(
    checkpoint: str, overrides: Tuple[str, ...], samples: Optional[int], out: Optional[str]
) -> None:
    """Measure the running statistics of CHECKPOINT's model anew and write its parameters."""
    saved = _saved(checkpoint, overrides)
    from .saved import calibrate_saved, evaluate_saved

    before = evaluate_saved(saved)
    calibrate_saved(saved, samples)
    after = evaluate_saved(saved)
    if dist.is_root():
        path = out or str(saved.path.resolve().parents[1] / "calibrated.params")
        saved.net.save_parameters(path)
        click.echo(f"accuracy {before.accuracy:.4f} -> {after.accuracy:.4f}; wrote {path}")
    dist.shutdown()


@main.command()
@click.argument("checkpoint", type=click.Path())
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT... [SETTING=VALUE]...")
@click.option("--output", type=click.Path(dir_okay=False), help="Default: standard output.")
@click.option("--format", "format_", type=click.Choice(["csv", "json"]), help="Default: --output's")
@click.option("--picture", type=click.Path(dir_okay=False), help="PNG with the images and answers.")
@click.option("--invert", is_flag=True, help="The images are dark objects on a light ground.")
def predict(
    checkpoint: str,
    inputs: Tuple[str, ...],
    output: Optional[str],
    format_: Optional[str],
    picture: Optional[str],
    invert: bool,
) -> None:
    """Say what the model of CHECKPOINT takes images for.

    INPUT is an image file, a folder of them, or an IDX file (gzipped or not).
    """
    _alone("predict")
    overrides = tuple(word for word in inputs if "=" in word and not Path(word).exists())
    saved = _saved(checkpoint, overrides)
    from . import images, predict

    paths = [word for word in inputs if word not in overrides]
    found = images.read(paths, saved.image_size, invert)
    if saved.config.data.dataset != "idx" and found.light_backgrounds:
        click.echo(
            f"note: {found.light_backgrounds} of {len(found.names)} images have a light "
            f"background, the training images a dark one{'' if invert else ': --invert?'}",
            err=True,
        )
    answers = predict.predict(saved, found)
    as_json = format_ == "json" or (format_ is None and str(output).endswith(".json"))
    text = predict.as_json(answers) if as_json else predict.as_csv(answers)
    with _writing():
        if output is not None:
            Path(output).write_text(text, encoding="utf-8")
        if picture is not None:
            predict.write_picture(answers, Path(picture))
    if output is None:
        click.echo(text, nl=False)


@main.command()
@click.argument("checkpoint", type=click.Path())
@overridden
@click.option("--output", type=click.Path(file_okay=False), required=True, help="The folder.")
@click.option("--no-onnx", is_flag=True, help="MXNet's own files alone.")
def export(checkpoint: str, overrides: Tuple[str, ...], output: str, no_onnx: bool) -> None:
    """Write CHECKPOINT's model for MXNet and ONNX, check both, and describe it (model_card.md)."""
    _alone("export")
    saved = _saved(checkpoint, overrides)
    from . import export, model_card
    from .saved import evaluate_saved, test_set

    export.check_possible(saved, onnx=not no_onnx)
    test, seen = test_set(saved), evaluate_saved(saved)
    folder = Path(output)
    with _writing():
        files = export.export(saved, test, folder, onnx=not no_onnx)
        command = f"python -m trainer {' '.join(map(shlex.quote, sys.argv[1:]))}"
        card = model_card.as_markdown(saved, seen, command, files)
        (folder / "model_card.md").write_text(card, encoding="utf-8")
    for checked in files:
        click.echo(str(checked))
    click.echo(f"wrote {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


@main.command()
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
    """Measure the run that CONFIG describes: speed, where a step's time goes, memory.

    On the ranks that the launcher started; or, with --ranks and --sweep, on ranks of its own, one
    combination after another. It writes nothing but what is asked for.
    """
    several = bool(sweep or ranks)
    if several:
        _alone("bench with --sweep or --ranks")
        if timeline is not None:
            raise click.UsageError("--timeline goes with one bench, not with --sweep or --ranks")
    with _writing():  # told now, not after the measurement
        if json_path is not None and dist.launched_rank() == 0:
            open(json_path, "a").close()
        if timeline is not None:
            os.makedirs(timeline, exist_ok=True)
    found: Any
    if several:
        from . import bench_sweep, bench_table

        path, overrides = _split(config, overrides)
        chosen = bench_sweep.combinations(sweep, ranks or "1")
        options = (f"--steps={steps}", f"--warmup={warmup}")
        found = bench_sweep.measure(path, overrides, chosen, options)
        bench_table.show_sweep(list(zip(chosen, map(bench_table.from_dict, found))))
    else:
        settings = _load(config, overrides)
        from . import bench, bench_table

        figures = bench.measure(settings, steps, warmup, Path(timeline) if timeline else None)
        dist.shutdown()
        found = bench_table.as_dict(settings, figures)
        if dist.launched_rank() == 0:
            bench_table.show(settings, figures)
    if json_path is not None and dist.launched_rank() == 0:
        Path(json_path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


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
@click.argument("folder", default="runs", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="A list of objects.")
def runs(folder: Path, as_json: bool) -> None:
    """List the runs in FOLDER (default: runs) with their figures."""
    from . import runs as past

    found = past.find(folder)
    _show([run._asdict() for run in found] if as_json else past.as_table(found))


@main.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="An object of settings and results.")
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Show in what the runs in two folders differ: settings, and what came of them."""
    from . import runs as past

    found = past.compare(first, second)
    _show(found._asdict() if as_json else past.comparison_table(found, first, second))


@main.command()
@configured
@overridden
def config(config: str, overrides: Tuple[str, ...]) -> None:
    """Check a config and show it with every default."""
    click.echo(config_module.as_yaml(_load(config, overrides)), nl=False)


def _alone(command: str) -> None:
    if dist.launched_size() > 1:
        raise click.UsageError(f"{command} runs on one process: leave the launcher out")


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """What cannot be written is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise click.UsageError(f"{error.filename} cannot be written: {error.strerror}") from error


def _show(what: Any) -> None:
    """Print a table, as wide as it must be where nobody watches, or anything else as JSON."""
    import json

    from rich.console import Console
    from rich.table import Table

    if isinstance(what, Table):
        Console(width=None if sys.stdout.isatty() else 200).print(what, highlight=False)
    else:
        click.echo(json.dumps(what, indent=1))


def _saved(checkpoint: str, overrides: Tuple[str, ...]) -> Any:
    device.share_cores()
    from . import saved

    return saved.load(checkpoint, overrides)


def _split(config: Any, overrides: Tuple[str, ...]) -> Tuple[Any, Tuple[str, ...]]:
    """The config's file, if any, and the overrides: the first word may read like one."""
    return (None, (config, *overrides)) if config and "=" in config else (config, overrides)


def _load(config: Any, overrides: Tuple[str, ...]) -> config_module.Config:
    settings = config_module.load(*_split(config, overrides))
    device.share_cores()
    return settings


def run() -> None:
    """Enter here: what the user can mend ends in one line, on rank 0; the rest names its rank."""
    try:
        main(standalone_mode=False)
        console.flush()
    except click.ClickException as error:
        _leave(error.format_message(), USER_ERROR)
    except (ValueError, dist.PeerError) as error:
        # ConfigError, DataError and CheckpointError: told to all ranks, so one of them prints.
        _leave(str(error), USER_ERROR)
    except click.Abort:
        _leave("interrupted", 130)
    except Exception as error:
        from .loop import TrainingError

        if isinstance(error, TrainingError):
            _leave(str(error), USER_ERROR)
        where = dist.where()
        if "Horovod has been shut down" in str(error):
            said = f"{where}: another rank has ended; what it says is the cause"
        else:
            said = f"{traceback.format_exc()}{where} failed: {type(error).__name__}: {error}"
        console.print_line(said, sys.stderr)
        _exit(1)


def _leave(message: str, code: int) -> None:
    if dist.launched_rank() == 0:
        # What was given may hold line breaks.
        console.print_line(f"error: {' '.join(message.split())}", sys.stderr)
    _exit(code)


def _exit(code: int) -> None:
    # Not sys.exit: MXNet's engine may hold collectives that never end, and waits for them.
    console.flush()
    os._exit(code)


if __name__ == "__main__":
    run()

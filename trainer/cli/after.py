"""The commands that use a checkpoint: evaluate, calibrate, average, predict, export."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, Optional, Tuple

import click

from .. import dist
from ..console import answer, one_line, print_line, warn
from ..dist import device, environment
from . import common

FILE = click.Path(dir_okay=False, writable=True)
FOLDER = click.Path(file_okay=False)


@click.command(cls=common.Configured)
@common.of_model
def evaluate(**model: Any) -> None:
    """Evaluate CHECKPOINT (of a run's folder, its best) on the whole test (or validation) set."""
    saved = common.load_saved(**model)
    from ..inference.trained_model import evaluate_saved, test_set

    with dist.together():
        source = test_set(saved)
    seen = evaluate_saved(saved, source)
    dist.shutdown()
    if environment.rank() == 0:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in seen.scalars().items())
        which = "" if source.called == "test" else f" ({source.called} set; there is no test set)"
        lines = [f"{saved.source}{which}: {figures}  ({seen.samples} images)"]
        pairs = zip(map(one_line, saved.class_names), seen.class_accuracy)
        answer("\n".join([*lines, *(f"  {name:12} {share:.4f}" for name, share in pairs)]))


@click.command(cls=common.Configured)
@click.option("--samples", type=click.IntRange(min=1), help="Training images to use; default: all.")
@click.option("--output", type=FILE, help="Default: calibrated.params in the run's folder.")
@common.of_model
def calibrate(samples: Optional[int], output: Optional[str], **model: Any) -> None:
    """Recompute the running statistics of CHECKPOINT's model and write its parameters.

    evaluate, predict and export take the file by --params.
    """
    saved = common.load_saved(**model)
    from ..checkpoint import params_file
    from ..inference.trained_model import calibrate_saved, evaluate_saved, find_test_set

    path = output or str(common.in_run_of(saved.path, "calibrated.params"))
    with contextlib.ExitStack() as stack:
        with dist.together():  # fails before the measurement, not after it
            file = stack.enter_context(common.written(path if dist.is_root() else None))
            source = find_test_set(saved)
        told = f"wrote {path}"
        if source is not None:  # finite or not: that is what it is to mend
            before = evaluate_saved(saved, source, finite=False)
        calibrate_saved(saved, samples)
        if source is not None:
            after = evaluate_saved(saved, source)
            moved = f"accuracy {before.accuracy:.4f} -> {after.accuracy:.4f}"
            told = f"{source.called} {moved}; {told}"
        if file is not None:
            with params_file.whole(file):
                saved.net.save_parameters(str(file))
    if dist.is_root():
        print_line(told)
    dist.shutdown()


@click.command(cls=common.Configured)
@click.argument("where", nargs=-1, required=True, metavar="CHECKPOINT... [SETTING=VALUE]...")
@click.option("--output", type=FILE, help="Default: averaged.params in the first one's run.")
@common.trusting
def average(where: Tuple[str, ...], output: Optional[str], trust: bool) -> None:
    """Average the weights of CHECKPOINTs of one net (of a run's folder, all) and write them.

    evaluate, calibrate, predict and export take the file by --params.
    """
    common.alone("average")
    overrides = tuple(w for w in where if "=" in w and not os.path.exists(common.in_runs(w)))
    places = [common.in_runs(word) for word in where if word not in overrides]
    if not places:
        raise click.UsageError("name the checkpoints, or the run's folder, to average")
    saved = common.load_saved(places[0], overrides, trust)
    from ..checkpoint import params_file
    from ..inference import averaging
    from ..inference.trained_model import evaluate_saved

    paths = averaging.checkpoints(places)
    path = output or str(common.in_run_of(saved.path, "averaged.params"))
    with common.written(path) as file:
        assert file is not None  # a path was given
        averaging.average(saved, paths)
        accuracy = ""
        source = _test_set(saved)
        if source is not None:
            seen = evaluate_saved(saved, source, finite=False)
            accuracy = f", {source.called} accuracy {seen.accuracy:.4f}"
        with params_file.whole(file):
            saved.net.save_parameters(str(file))
    print_line(f"wrote {path}, the mean of {len(paths)} checkpoints{accuracy}")


@click.command(cls=common.Configured)
@common.of_run("checkpoint")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT... [SETTING=VALUE]...")
@click.option("--output", type=FILE, help="Default: standard output.")
@click.option("--format", "format_", type=click.Choice(["csv", "json"]), help="Default: --output's")
@click.option("--picture", type=FILE, help="PNG of images and predictions.")
@click.option("--invert", is_flag=True, help="Images are dark on light.")
@common.other_weights
@common.trusting
@click.option("--strict", is_flag=True, help="Stop at a file that cannot be read.")
def predict(
    checkpoint: str,
    inputs: Tuple[str, ...],
    output: Optional[str],
    format_: Optional[str],
    picture: Optional[str],
    invert: bool,
    params: Optional[str],
    trust: bool,
    strict: bool,
) -> None:
    """Predict the classes of images with CHECKPOINT's model.

    INPUT is an image file, a folder of them or, for nets not trained on pictures, an IDX file
    (gzipped or not). Files that cannot be read are named and left out.
    """
    common.alone("predict")
    overrides = tuple(word for word in inputs if "=" in word and not os.path.exists(word))
    paths = [word for word in inputs if word not in overrides]
    if not paths:
        raise click.UsageError("name the images to predict: files, or folders of them")
    with common.written(output) as answers_file, common.written(picture) as picture_file:
        saved = common.load_saved(checkpoint, overrides, trust, params)
        from ..inference import images, predict

        pictures = saved.config.data if saved.config.data.of_pictures else None
        found = images.read(paths, saved.image_shape, invert, strict, pictures)
        for line in found.skipped:
            print_line(f"skipped: {' '.join(line.split())}", sys.stderr)
        answers = predict.predict(saved, found)
        as_json = format_ == "json" or (format_ is None and str(output).endswith(".json"))
        text = predict.as_json(answers) if as_json else predict.as_csv(answers)
        if answers_file is not None:
            answers_file.write_text(text, encoding="utf-8")
        if picture_file is not None:
            predict.write_picture(answers, picture_file)
    if output is None:
        answer(text.rstrip("\n"))


@click.command(cls=common.Configured)
@click.option("--output", type=FOLDER, help="Default: exported, in the run's folder.")
@click.option("--no-onnx", is_flag=True, help="Write only MXNet's own files.")
@common.of_model
def export(output: Optional[str], no_onnx: bool, **model: Any) -> None:
    """Export CHECKPOINT's model for MXNet and ONNX, check both, and write a model card."""
    common.alone("export")
    device.share_cores()
    from ..checkpoint import find, whole_file  # late: that room loads MXNet

    folder = Path(output) if output else common.in_run_of(find(model["checkpoint"]), "exported")
    with common.writing(folder), whole_file.filled(folder) as partial:
        saved = common.load_saved(**model)
        from ..inference import export, model_card
        from ..inference.trained_model import evaluate_saved

        export.check_possible(saved, onnx=not no_onnx)
        test = _test_set(saved)
        seen = None if test is None else evaluate_saved(saved, test)
        if seen is not None and test is not None and not model["overrides"]:
            export.check_accuracy(saved, seen, test.called)
        files = export.export(saved, test, partial, onnx=not no_onnx)
        command = f"python -m trainer {' '.join(map(shlex.quote, sys.argv[1:]))}"
        called = "test" if test is None else test.called
        card = model_card.as_markdown(saved, seen, command, files, called)
        (partial / "model_card.md").write_text(card, encoding="utf-8")
        written = sorted(file.name for file in partial.iterdir())
        earlier = folder / export.ONNX
        removed = "; removed the earlier model.onnx" if no_onnx and earlier.exists() else ""
        if removed:
            earlier.unlink()
    print_line("\n".join([*map(str, files), f"wrote {folder}: {', '.join(written)}{removed}"]))


def _test_set(saved: Any) -> Any:
    """What an average or an export is measured on; None without, as neither needs a set.

    That the run's own cannot be had is told; one that is named on the command line must be there.
    """
    from ..data.idx_file import DataError
    from ..inference.trained_model import find_test_set

    if saved.on_given_images:
        return None
    try:
        return find_test_set(saved)
    except DataError as error:
        if not saved.own_set:
            raise
        warn(f"no accuracy is measured: {error}; data.folder=FOLDER says where the data is now")
        return None


@click.command()
@click.argument("folder", default="runs", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="A list of objects.")
def runs(folder: Path, as_json: bool) -> None:
    """List the runs in FOLDER (default: runs) and their results."""
    from ..report import result as past

    found = past.find(folder)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    table = None if as_json else past.as_table(found, width)
    answer(table or json.dumps([run._asdict() for run in found], indent=1))


@click.command()
@common.of_run("first")
@common.of_run("second")
@click.option("--json", "as_json", is_flag=True, help="An object of settings and results.")
def compare(first: str, second: str, as_json: bool) -> None:
    """Show the settings and results in which two runs differ."""
    from ..report import result as past

    folders = Path(first), Path(second)
    found = past.compare(*folders)
    table = None if as_json else past.comparison_table(found, *folders)
    answer(table or json.dumps(found, indent=1))

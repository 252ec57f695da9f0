"""Runs in bfloat16 and float16 on one process."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import half
from tests.processor import needs_bfloat16
from trainer import checkpoint
from trainer.config import from_dict
from trainer.config.schema import Config, Monitor
from trainer.inference import trained_model
from trainer.model import loss_scale
from trainer.run.loop import fit

from .commands import ROOT, SMALL, trainer
from .test_any_net import SET


def config(folder: Path, precision: str, **train: Any) -> Config:
    """Five epochs of three steps."""
    settings = {"epochs": 5, "global_batch_size": 4, "precision": precision, **train}
    return from_dict(
        {
            "output": str(folder),
            "name": precision,
            "model": {"factory": "tests.integration.nets:smooth"},
            "train": settings,
            "monitor": {"loggers": []},
        }
    )


def weights(settings: Config) -> bytes:
    """Every bit of what a run's last checkpoint holds of the net."""
    last = checkpoint.listing(settings.folder / "checkpoints")[-1]
    arrays = mx.nd.load(str(last / checkpoint.PARAMETERS))
    assert {array.dtype for array in arrays.values()} == {np.float32}
    return b"".join(arrays[name].asnumpy().tobytes() for name in sorted(arrays))


@needs_bfloat16
def test_runs_of_one_process_keep_their_own_precision_and_resume_bit_for_bit(
    tmp_path: Path,
) -> None:
    found = []
    for part, precision in enumerate(("float32", "bfloat16", "float32", "bfloat16")):
        folder = tmp_path / str(part)
        stops = [None] if part < 2 else [7, None]  # within the third epoch
        for stop in stops:
            run = config(folder, precision, max_steps=stop)
            fit(config=run, train=SET, test=SET)
        found.append(weights(run))
    assert found[0] == found[2] != found[1] == found[3]


@needs_bfloat16
def test_the_saved_model_is_evaluated_in_float32_and_trained_on_in_its_precision(
    tmp_path: Path,
) -> None:
    run = config(tmp_path, "bfloat16")
    evaluation = fit(config=run, train=SET, test=SET).evaluation
    last = checkpoint.listing(run.folder / "checkpoints")[-1]
    seen = trained_model.evaluate_saved(trained_model.load(str(last), trust=True), test=SET)
    assert evaluation is not None and seen.loss == pytest.approx(evaluation.loss, rel=1e-6)
    other = replace(run, train=replace(run.train, precision="float32"))
    with pytest.raises(
        checkpoint.CheckpointError, match="train.precision: 'bfloat16' -> 'float32'"
    ):
        fit(config=other, train=SET, test=SET)


def test_float16s_scale_and_skipped_steps_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In the log, TensorBoard and the checkpoint; 2^24 is more than the gradients can take."""
    half.allow(monkeypatch)
    monkeypatch.setattr(loss_scale, "START", 2.0**24)
    run = config(tmp_path, "float16")
    run = replace(run, device="cpu", monitor=Monitor(every_steps=5))
    fit(config=run, train=SET, test=SET)
    last = checkpoint.listing(run.folder / "checkpoints")[-1]
    scale, good, skipped = checkpoint.read_state(last).loss_scale or (0, 0, 0)
    assert scale == 2.0 ** (24 - skipped) and 0 < skipped <= 15 - good
    told = capsys.readouterr().out
    assert f"loss scale {scale:g} ({skipped:g} steps skipped)" in told
    events = EventAccumulator(str(run.folder / "events")).Reload()
    assert events.Scalars("optimizer/loss_scale")[-1].value == scale
    assert events.Scalars("optimizer/skipped_steps")[-1].value == skipped


def test_a_cpu_refuses_float16_before_anything_is_written(tmp_path: Path) -> None:
    command = trainer("train", *SMALL, f"output={tmp_path}/runs", "train.precision=float16")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert "error: train.precision is float16, which MXNet has on GPUs alone" in done.stderr


def test_an_older_processor_is_reported_before_anything_is_written(tmp_path: Path) -> None:
    command = trainer("train", *SMALL, f"output={tmp_path}/runs", "train.precision=bfloat16")
    older = {**os.environ, "DNNL_MAX_CPU_ISA": "AVX2"}  # oneDNN takes this one for such
    done = subprocess.run(command, cwd=ROOT, env=older, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert "error: train.precision is bfloat16, which takes a processor with AVX-512" in done.stderr

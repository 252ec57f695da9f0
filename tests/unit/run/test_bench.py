"""`trainer bench`: its measurements, its clock and its tables."""

from __future__ import annotations

import dataclasses
import json

import pytest

from trainer.config import Config, Schedule
from trainer.run import bench_table
from trainer.run.bench import PHASES, Figures, percentiles
from trainer.step.schedule import lr_schedule

FIGURES = Figures(
    ranks=2,
    device="cpu(0)",
    steps=10,
    training=200.0,
    training_percentiles={"10": 150.0, "50": 210.0, "90": 220.0},
    step=0.06,
    synchronised=180.0,
    loader=5000.0,
    evaluation=900.0,
    phases={**dict.fromkeys(PHASES, 0.01), "allreduce": 0.04},
    small_sum=0.0002,
    gradient_bytes=45_000_000,
    peak_mib=[300.0, 310.4],
)


def test_percentiles():
    found = percentiles([float(n) for n in range(1, 12)])
    assert found == {"10": 2.0, "50": 6.0, "90": 10.0}


def test_speeds_and_phases_are_shown():
    lines = bench_table.as_text(Config(), FIGURES).splitlines()
    assert lines[1:4] == [
        "              images/s",
        "training         200.0  of steps: 150.0 (10 %), 210.0, 220.0 (90 %)",
        "synchronised     180.0  training, every phase waited for",
    ]
    assert lines[4].split() == ["loader", "alone", "5,000", "25.0", "times", "training"]
    assert "allreduce of gradients      40.00  40.0 %" in lines
    assert ["all", "100.00"] in [line.split() for line in lines]
    assert [line.split() for line in lines[-3:-1]] == [["0", "300"], ["1", "310"]]


@pytest.mark.parametrize(("step", "hidden"), [(0.04, 1), (0.05, 1), (0.06, 0.75), (0.2, 0)])
def test_what_a_step_hides_of_the_allreduce(step: float, hidden: float) -> None:
    """0.05 s of its phases are no allreduce and no waiting for other ranks, 0.04 are allreduce."""
    assert dataclasses.replace(FIGURES, step=step).hidden == pytest.approx(hidden)


def test_what_is_between_the_ranks_is_shown_and_what_to_change() -> None:
    text = bench_table.as_text(Config(), FIGURES)
    rows = [line.split() for line in text.splitlines()]
    assert ["a", "small", "sum", "0.20"] in [row[:4] for row in rows]
    assert ["gradients,", "alone", "40.00", "45.0", "MB,", "1,125", "MB/s"] in rows
    assert ["gradients,", "in", "training", "10.00", "75", "%"] in [row[:6] for row in rows]
    assert rows[-1][:4] == ["17", "%", "of", "a"] and "optimizer.fp16_allreduce=true" in text
    alone = bench_table.as_text(Config(), dataclasses.replace(FIGURES, ranks=1))
    assert "between ranks" not in alone and "waits for gradients" not in alone
    quick = bench_table.as_text(Config(), dataclasses.replace(FIGURES, step=0.05))
    assert "waits for gradients" not in quick


def test_json_holds_settings_and_figures():
    values = json.loads(json.dumps(bench_table.as_dict(Config(), FIGURES)))
    assert values["figures"].items() >= dataclasses.asdict(FIGURES).items()
    assert values["config"]["train"]["global_batch_size"] == 128
    assert values["figures"]["headroom"] == 25.0


def test_a_benchmark_may_take_more_steps_than_a_run_that_is_all_warm_up() -> None:
    shares = [lr_schedule(Schedule(warmup_epochs=2), step, 3, 2) for step in (5, 6, 9)]
    assert shares == [1, 1, 0]

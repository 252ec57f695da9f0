"""`trainer bench`: its measurements, its clock and its tables."""

from __future__ import annotations

import dataclasses
import json

from trainer.config import Config
from trainer.run import bench_table
from trainer.run.bench import PHASES, Figures, percentiles

FIGURES = Figures(
    ranks=2,
    device="cpu(0)",
    steps=10,
    training=200.0,
    training_percentiles={"10": 150.0, "50": 210.0, "90": 220.0},
    synchronised=180.0,
    loader=5000.0,
    evaluation=900.0,
    phases={**dict.fromkeys(PHASES, 0.01), "allreduce": 0.04},
    peak_mib=[300.0, 310.4],
)


def test_percentiles():
    found = percentiles([float(n) for n in range(1, 12)])
    assert found == {"10": 2.0, "50": 6.0, "90": 10.0}


def test_speeds_and_phases_are_shown():
    _, speeds = bench_table.speeds(FIGURES)
    assert speeds[0] == ("training", "200.0", "of steps: 150.0 (10 %), 210.0, 220.0 (90 %)")
    assert speeds[2] == ("loader alone", "5,000", "25.0 times training")
    _, phases = bench_table.phases(FIGURES)
    assert ("allreduce of gradients", "40.00", "40.0 %") in phases
    assert phases[-1][:2] == ("all", "100.00")
    assert bench_table.memory(FIGURES)[1] == [("0", "300"), ("1", "310")]


def test_json_holds_settings_and_figures():
    values = json.loads(json.dumps(bench_table.as_dict(Config(), FIGURES)))
    assert values["figures"].items() >= dataclasses.asdict(FIGURES).items()
    assert values["config"]["train"]["global_batch_size"] == 128
    assert values["figures"]["headroom"] == 25.0

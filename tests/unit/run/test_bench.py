"""`trainer bench`: its measurements, its clock and its tables."""

from __future__ import annotations

import dataclasses
import json

import click
import pytest

from trainer.cli.main import main
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.run import bench_table
from trainer.run.bench import PHASES, Figures, percentiles
from trainer.run.bench_sweep import Combination, combinations, measure

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


def test_every_combination():
    found = combinations(["train.epochs=1,2", "optimizer.nesterov=true"], "1,4")
    assert found == [
        Combination(ranks, (f"train.epochs={epochs}", "optimizer.nesterov=true"))
        for ranks in (1, 4)
        for epochs in (1, 2)
    ]
    assert combinations([], "2") == [Combination(2, ())]


def test_commas_within_brackets_do_not_part_values():
    found = combinations(["schedule.milestones=[3,6],[4]", "model.arguments={a: 1, b: 2}"], "1")
    assert [c.overrides[0] for c in found] == [
        "schedule.milestones=[3,6]",
        "schedule.milestones=[4]",
    ]
    assert {c.overrides[1] for c in found} == {"model.arguments={a: 1, b: 2}"}


@pytest.mark.parametrize("ranks", ["", "0", "two", "1,,2", "1.5", "-1"])
def test_numbers_of_ranks_are_whole_and_positive(ranks):
    with pytest.raises(ConfigError, match="--ranks is .* whole numbers from 1"):
        combinations([], ranks)


@pytest.mark.parametrize("sweep", ["train.epochs", "=1,2", "train.epochs="])
def test_sweep_names_a_setting_and_values(sweep):
    with pytest.raises(ConfigError, match="--sweep is .* must read setting=value,value"):
        combinations([sweep], "1")


def test_bad_value_is_reported_before_the_first_combination_is_started(capfd):
    chosen = combinations(["train.epochs=1,none"], "1")
    with pytest.raises(ConfigError, match="train.epochs is 'none'"):
        measure(None, ["data.dataset=fashion_mnist_sample"], chosen, [])
    assert capfd.readouterr().err == ""


def test_traces_of_several_runs_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(click.UsageError, match="--timeline goes with one bench"):
        main(["bench", "--ranks=2", f"--timeline={tmp_path}/traces"], standalone_mode=False)
    assert not list(tmp_path.iterdir())


def test_speeds_and_phases_are_shown():
    _, speeds = bench_table.speeds(FIGURES)
    assert speeds[0] == ("training", "200.0", "of steps: 150.0 (10 %), 210.0, 220.0 (90 %)")
    assert speeds[2] == ("loader alone", "5,000", "25.0 times training")
    _, phases = bench_table.phases(FIGURES)
    assert ("allreduce of gradients", "40.00", "40.0 %") in phases
    assert phases[-1][:2] == ("all", "100.00")
    assert bench_table.memory(FIGURES)[1] == [("0", "300"), ("1", "310")]


def test_sweep_has_a_line_for_each_combination():
    one = dataclasses.replace(FIGURES, ranks=1, training=90.0)
    columns, rows = bench_table.sweep(
        [(Combination(1, ("train.epochs=1",)), one), (Combination(2, ("train.epochs=1",)), FIGURES)]
    )
    assert columns[:3] == ("ranks", "train.epochs", "images/s")
    assert [row[:3] for row in rows] == [("1", "1", "90.0"), ("2", "1", "200.0")]
    assert all(len(row) == len(columns) for row in rows)


def test_json_gives_the_figures_back():
    values = json.loads(json.dumps(bench_table.as_dict(Config(), FIGURES)))
    assert bench_table.from_dict(values) == FIGURES
    assert values["config"]["train"]["global_batch_size"] == 128
    assert values["figures"]["headroom"] == 25.0

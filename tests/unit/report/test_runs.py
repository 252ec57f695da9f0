"""Past runs, listed and compared from their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from trainer.cli.main import main
from trainer.config import Config, Optimizer, as_yaml
from trainer.report import result
from trainer.report.report import Report

DONE = {
    "state": "done",
    "started": "2026-11-23T01:02:03+00:00",
    "step": 32,
    "last_step": 32,
    "epochs": 2,
    "ranks": 2,
    "accuracy": 0.8,
    "loss": 0.5,
    "best_accuracy": 0.9,
    "images_per_second": 1234.0,
    "seconds": 65.0,
    "test_accuracy": 0.75,
}


def make(folder: Path, config: Config, **figures: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(as_yaml(config))
    if figures:
        result.write_result(folder, **figures)
    return folder


def save(folder: Path, step: int, accuracy: object) -> None:
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    state = {"step": step, "accuracy": accuracy, "totals": [[0.0] * 3] * 2}
    (path / "state.json").write_text(json.dumps({**state, "config": {}, "optimizer": {}}))


def test_a_finished_run_is_what_its_result_says(tmp_path):
    run = result.read(make(tmp_path / "a", Config(), **DONE))
    assert run._asdict() == {"name": "a", **DONE}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "config.yaml",
        "result.json",
    ]


def test_a_killed_run_stands_where_its_newest_checkpoint_does(tmp_path):
    start = {name: DONE[name] for name in ("started", "last_step", "epochs", "ranks")}
    folder = make(tmp_path / "a", Config(), **{**start, "state": "unfinished", "step": 0})
    assert (result.read(folder).step, result.read(folder).accuracy) == (0, None)
    save(folder, 16, 0.7)
    save(folder, 24, None)
    save(folder, 30, None)
    (folder / "checkpoints" / "step-00000030" / "state.json").write_text("{")
    run = result.read(folder)
    assert (run.state, run.step, run.best_accuracy) == ("unfinished", 24, 0.7)


def test_a_run_of_before_there_were_results_is_listed(tmp_path):
    run = result.read(make(tmp_path / "a", Config()))
    assert (run.state, run.step, run.started, run.ranks) == ("unfinished", 0, None, None)


def test_runs_are_listed_by_their_start(tmp_path):
    make(tmp_path / "a", Config(), **DONE)
    make(tmp_path / "b", Config(), **{**DONE, "started": "2026-11-22T23:00:00+00:00"})
    (tmp_path / "c").mkdir()
    assert [run.name for run in result.find(tmp_path)] == ["b", "a"]
    shown = CliRunner().invoke(main, ["runs", str(tmp_path)])
    assert shown.exit_code == 0
    first, second, third = shown.output.splitlines()
    assert first.split()[:2] == ["run", "started"] and second.split()[0] == "b"
    for cell in ("2026-11-23 01:02", "done", "32/32", "0.8000", "0.9000", "1234", "1:05"):
        assert cell in third
    listed = json.loads(CliRunner().invoke(main, ["runs", str(tmp_path), "--json"]).output)
    assert [run["name"] for run in listed] == ["b", "a"] and listed[1]["accuracy"] == 0.8


def test_the_accuracy_on_a_test_set_beside_a_validation_set_has_a_column_of_its_own(tmp_path):
    make(tmp_path / "a", Config(), **{**DONE, "test_accuracy": None})
    assert "test" not in CliRunner().invoke(main, ["runs", str(tmp_path)]).output.split()
    make(tmp_path / "b", Config(), **{**DONE, "test_accuracy": 0.7654})
    titles, *rows = CliRunner().invoke(main, ["runs", str(tmp_path)]).output.splitlines()
    assert "test" in titles.split() and [row.count("0.7654") for row in rows] == [0, 1]


def test_compared_are_settings_and_results_that_differ(tmp_path):
    first = make(tmp_path / "a", Config(name="a"), **DONE)
    second = make(
        tmp_path / "b",
        Config(name="b", optimizer=Optimizer(lr=0.2), batch_norm="sync"),
        **{**DONE, "accuracy": 0.85},
    )
    found = result.compare(first, second)
    assert found["settings"] == {
        "name": ["a", "b"],
        "batch_norm": ["local", "sync"],
        "optimizer.lr": [0.1, 0.2],
    }
    assert found["results"] == {"name": ["a", "b"], "accuracy": [0.8, 0.85]}
    (second / "config.yaml").write_text("batch_norm: sync\noptimizer: {lr: 0.2, groups: 2}\n")
    older = result.compare(first, second)["settings"]  # what it does not say has its default
    assert older == {**found["settings"], "name": ["a", "default"]}
    (second / "config.yaml").write_text("batch_norm: sync\noptimizer: {lr: 0.2}\n")
    shown = CliRunner().invoke(main, ["compare", str(first), str(second)]).output
    lines = [line.split() for line in shown.splitlines()]
    assert ["optimizer.lr", "0.1", "0.2"] in lines and ["accuracy", "0.8", "0.85"] in lines
    as_json = CliRunner().invoke(main, ["compare", str(first), str(second), "--json"]).output
    assert json.loads(as_json)["settings"]["optimizer.lr"] == [0.1, 0.2]
    (second / "config.yaml").write_text("optimizer: {lr: 0.1000001}\n")
    shown = CliRunner().invoke(main, ["compare", str(first), str(second)]).output
    assert ["optimizer.lr", "0.1", "0.1000001"] in [line.split() for line in shown.splitlines()]


def test_figures_that_are_not_finite_are_null(tmp_path):
    folder = make(tmp_path / "a", Config(), **{**DONE, "loss": float("nan")})
    assert "NaN" not in (folder / "result.json").read_text()
    assert result.read(folder).loss is None
    (folder / "result.json").write_text('{"state": "done", "loss": NaN}')  # as 0.5.0 wrote it
    assert json.loads(CliRunner().invoke(main, ["runs", str(tmp_path), "--json"]).output)
    assert result.read(folder).loss is None and result.read(folder).state == "done"


@pytest.mark.parametrize("content", ["[1", "3", "\0"])
def test_a_damaged_result_is_named(tmp_path, content):
    folder = make(tmp_path / "a", Config())
    (folder / "result.json").write_text(content)
    with pytest.raises(result.RunsError, match=r"result.json cannot be read"):
        result.read(folder)


def test_a_damaged_run_hides_no_other(tmp_path, capsys):
    make(tmp_path / "whole", Config(), **DONE)
    make(tmp_path / "types", Config(), **{**DONE, "accuracy": "high"})
    (make(tmp_path / "cut", Config()) / "result.json").write_text('{"a')
    (tmp_path / "foreign" / "config.yaml").mkdir(parents=True)
    found = {run.name: run for run in result.find(tmp_path)}
    assert found.keys() == {"whole", "types", "cut"}
    assert (found["cut"].state, found["types"].state) == ("unreadable", "unreadable")
    said = capsys.readouterr().err
    assert said.count("warning: ") == 2 and "types/result.json cannot be read: accuracy is" in said
    assert "unreadable" in CliRunner().invoke(main, ["runs", str(tmp_path)]).output


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_table_has_fewer_columns_and_cuts_no_figure(width):
    past = [result.Run(name, **DONE) for name in ("short", "a-name-of-twenty-one-")]
    lines = result.as_table(past, width).splitlines()
    titles = lines[0].split()
    assert {"run", "state", "steps", "accuracy"} < set(titles)
    assert ("started" in titles, "minutes" in titles) == (width == 120, width >= 80)
    for line in lines[1:]:
        assert len(line) <= width
        assert all(figure in line for figure in ("32/32", "0.8000", "0.7500"))


def test_the_folder_of_a_run_lists_that_run(tmp_path):
    assert result.find(make(tmp_path / "a", Config(name="a"), **DONE))[0].accuracy == 0.8


def test_where_there_is_no_run_one_line_says_so(tmp_path):
    with pytest.raises(result.RunsError, match="there is no folder .*/none"):
        result.find(tmp_path / "none")
    with pytest.raises(result.RunsError, match="holds no run"):
        result.find(tmp_path)
    with pytest.raises(result.RunsError, match="is no run: it holds no config.yaml"):
        result.compare(tmp_path, tmp_path)


@pytest.mark.parametrize("content", ["- a list", "[1", "{when: 1, when: 2}"])
def test_a_damaged_config_is_reported_in_one_line(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(result.RunsError, match="config.yaml") as raised:
        result.compare(tmp_path, tmp_path)
    assert "\n" not in str(raised.value)


def test_names_and_values_of_strangers_control_no_table(tmp_path: Path) -> None:
    """Nor are they taken for the markup or the lines of one."""
    name = "\x1b]0;owned\x07[red]x[bold] :smile:\nfake"
    shown = "\\x1b]0;owned\\x07[red]x[bold] :smile:\\nfake"
    make(tmp_path / name, Config(output="a\x1b[8m"), **{**DONE, "state": "do\x1b[8mne\n[b]"})
    make(tmp_path / "other", Config(name="b"), **DONE)
    done = CliRunner().invoke(main, ["runs", str(tmp_path)], catch_exceptions=False)
    lines = done.output.splitlines()
    assert len(lines) == 3 and "\x1b" not in done.output
    assert any(shown in line and "do\\x1b[8mne\\n[b]" in line for line in lines)
    words = ["compare", str(tmp_path / name), str(tmp_path / "other")]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert "\x1b" not in done.output and "a\\x1b[8m" in done.output


@pytest.mark.parametrize(("before", "after"), [("stopped", "done"), ("stopped early", "kept")])
def test_a_stopped_run_that_is_complete_after_all_is_done(tmp_path, before, after):
    """As where a lower train.max_steps ends it."""
    config = Config(output=str(tmp_path), name="a")
    make(tmp_path / "a", config, **{**DONE, "state": before})
    report = Report(config, 1, 32, 32, ["x"], complete=True)
    report.end(32, "done", None, None)
    report.close()
    assert result.read(tmp_path / "a").state == (before if after == "kept" else after)

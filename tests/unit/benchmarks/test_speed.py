"""The bookkeeping of the benchmarks; not what they measure."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, Optional

import psutil
import pytest
import yaml

from benchmarks import (
    accuracy_choices,
    contenders,
    mutants,
    report,
    scaling_validation,
    speed,
    step_choices,
    update,
)
from trainer.config.settings import flat

ROOT = report.RESULTS.parents[1]


def recorded(name: str) -> Any:
    """The figures of ``results/NAME.json``."""
    return json.loads((report.RESULTS / f"{name}.json").read_text())["figures"]


def test_the_page_holds_the_table_of_the_results() -> None:
    for page, module, table in (
        (speed.PAGE, speed, speed.table()),
        (speed.PAGE, step_choices, step_choices.table()),
        (speed.PAGE, accuracy_choices, accuracy_choices.table(recorded("accuracy_choices"))),
        (update.PAGE, update, update.table()),
        (mutants.PAGE, mutants, mutants.show(recorded("mutants"))),
    ):
        begin, end = report.marks(module.__name__)
        assert begin + table + end in page.read_text()


def test_the_page_on_scaling_holds_the_table_of_the_results() -> None:
    begin, end = report.marks(scaling_validation.__name__)
    told = scaling_validation.summary(recorded("scaling_validation")["comparison"])
    assert begin + told + end in scaling_validation.PAGE.read_text()


@pytest.mark.parametrize("name", ["fashion_mnist", "fashion_mnist_best"])
def test_a_presets_record_is_of_its_settings(name: str) -> None:
    settings = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    given = flat(settings)
    assert len(given) > 10 and given.items() <= flat(recorded(name)["config"]).items()


@pytest.mark.parametrize("name", ["quickstart", "fashion_mnist", "fashion_mnist_best"])
def test_a_presets_accuracy_on_the_pages_is_the_recorded_one(name: str) -> None:
    last = list(recorded(name)["test accuracy"].values())[-1]
    for page in ("README.md", "README.zh.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        (row,) = re.findall(rf"^\| `configs/{name}\.yaml` .*", text, re.MULTILINE)
        assert f"| {100 * last:.2f} % |" in row, page


def test_a_table_takes_the_place_of_the_last(tmp_path: Path) -> None:
    page, (begin, end) = tmp_path / "page.md", report.marks("benchmarks.b")
    page.write_text(f"{report.marks('benchmarks.a')[0]}of a{end}\n{begin}old{end}\nthe rest\n")
    report.include(page, "benchmarks.b", "new")
    assert page.read_text().endswith(f"of a{end}\n{begin}new{end}\nthe rest\n")


def test_a_page_without_the_place_of_a_table_is_left_as_it_is(tmp_path: Path) -> None:
    page, (begin, end) = tmp_path / "page.md", report.marks("benchmarks.b")
    for content in (f"{end}\nthe rest\n", f"{begin}the rest\n"):
        page.write_text(content)
        with pytest.raises(ValueError, match="page.md has no"):
            report.include(page, "benchmarks.b", "new")
        assert page.read_text() == content


def test_a_choice_is_compared_to_the_unchanged_run_of_its_round() -> None:
    rounds = [(100, 90), (200, 190), (300, 330)]
    pairs = [
        {step_choices.AS_IS: {"images_per_second": one}, "x": {"images_per_second": other}}
        for one, other in rounds
    ]
    assert step_choices.cells("x", pairs) == ["x", "200", "190", "0.95", "3"]


def test_every_row_names_contenders_that_are_measured() -> None:
    for row in speed.ROWS:
        assert {row.one, row.other} <= speed.EXPERIMENTS[row.experiment].keys(), row


def test_contenders_alternate_and_medians_are_over_rounds(tmp_path: Path) -> None:
    order = []

    def contender(name: str, speeds: Any) -> Any:
        def run(data: Path) -> Any:
            order.append(name)
            return {"images_per_second": next(speeds)}

        return run

    contenders = {"a": contender("a", iter([1, 9, 2])), "b": contender("b", iter([5, 4, 6]))}
    rounds = speed.alternate("x", contenders, tmp_path, rounds=3)
    assert order == ["a", "b"] * 3
    assert speed.medians(rounds) == {"a": {"images_per_second": 2}, "b": {"images_per_second": 5}}


@pytest.mark.parametrize(
    "one, at_most, aim, verdict",
    [
        (150, False, 1.5, "met"),
        (149, False, 1.5, "**missed**"),
        (100, True, 1, "met"),
        (100, False, None, ""),
    ],
)
def test_a_ratio_is_compared_to_its_aim(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one: float,
    at_most: bool,
    aim: Optional[float],
    verdict: str,
) -> None:
    found = {"medians": {"a": {"s": one}, "b": {"s": 100}}}
    record = {"figures": found, "date": "2026-11-29", "machine": {"cpu": "AMD EPYC"}}
    (tmp_path / "speed_x.json").write_text(json.dumps(record))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    cells = speed.cells_of(speed.Row("t", "x", "s", "a", "b", aim, at_most))
    assert cells is not None and cells[-2:] == [verdict, "2026-11-29, AMD EPYC"]


def test_side_by_side_runs_add_up(tmp_path: Path) -> None:
    script = (
        "import json, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "told = {'images_per_second': 10, 'first_step_at': 0, 'peak_mib': %d}\n"
        "(out / '0.json').write_text(json.dumps(told))\n"
    )
    commands = [[sys.executable, "-c", script % peak] for peak in (7, 8)]
    figures = contenders.measure(commands, tmp_path, {})
    assert figures["images_per_second"] == 20
    assert figures["peak_mib"] == 8


def test_a_failed_contender_is_reported_and_its_peer_killed(tmp_path: Path) -> None:
    mine = tmp_path / "pid"
    fails = f"""
import pathlib, time
while not pathlib.Path({str(mine)!r}).exists():
    time.sleep(0.01)
raise OSError("no such gluon")
"""
    hangs = f"""
import os, pathlib, time
pathlib.Path({str(tmp_path / "new")!r}).write_text(str(os.getpid()))
os.rename({str(tmp_path / "new")!r}, {str(mine)!r})
time.sleep(600)
"""
    with pytest.raises(contenders.ContenderFailed, match="no such gluon"):
        contenders.measure([[sys.executable, "-c", code] for code in (fails, hangs)], tmp_path, {})
    assert not psutil.pid_exists(int(mine.read_text()))


def test_a_peer_that_crashes_once_is_tried_again_and_its_output_printed(
    capsys: pytest.CaptureFixture,
) -> None:
    failures = [contenders.ContenderFailed("Segmentation fault")]

    def crashes_once(data: Path) -> contenders.Figures:
        if failures:
            raise failures.pop()
        return {"seconds": 1}

    assert contenders.retried(crashes_once)(Path()) == {"seconds": 1}
    assert "Segmentation fault" in capsys.readouterr().out

    def always_crashes(data: Path) -> contenders.Figures:
        raise contenders.ContenderFailed("no gluon at all")

    with pytest.raises(contenders.ContenderFailed, match="no gluon at all"):
        contenders.retried(always_crashes)(Path())

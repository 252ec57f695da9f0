"""``python -m trainer bench`` on two ranks."""

from __future__ import annotations

import json

from .commands import SMALL, run, trainer

STEPS = ["--steps", "4", "--warmup", "1"]


def test_bench_under_horovodrun_writes_what_is_asked_for_and_nothing_else(tmp_path):
    path, traces = tmp_path / "figures.json", tmp_path / "traces"
    output = f"output={tmp_path / 'runs'}"
    options = [*STEPS, "--json", str(path), "--traces", str(traces)]
    done = run(trainer("bench", *SMALL, output, *options, ranks=2))
    assert done.code == 0, done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures.json", "traces"]
    for line in ("2 ranks", "loader alone", "allreduce of gradients", "peak memory"):
        assert line in done.out

    figures = json.loads(path.read_text())["figures"]
    speeds = figures["training_percentiles"]
    assert 0 < speeds["10"] <= speeds["50"] <= speeds["90"]
    assert min(figures["training"], figures["loader"], figures["evaluation"]) > 0
    assert all(figures["phases"][name] > 0 for name in ("forward", "backward", "allreduce"))
    assert len(figures["peak_mib"]) == 2 and min(figures["peak_mib"]) > 50

    files = [traces / f"mxnet-rank{rank}.json" for rank in (0, 1)]
    assert sorted(traces.iterdir()) == files, "Horovod has no part in these steps"
    for file in files:
        names = {event.get("name", "") for event in json.loads(file.read_text())["traceEvents"]}
        assert any("Convolution" in name for name in names)
        assert "allreduce of gradients" in names


def test_gradients_through_horovod_are_on_its_timeline(tmp_path):
    traces = tmp_path / "traces"
    settings = [f"output={tmp_path / 'runs'}", "optimizer.shared_memory=false"]
    done = run(trainer("bench", *SMALL, *settings, *STEPS, "--traces", str(traces), ranks=2))
    assert done.code == 0, done.err
    horovod = json.loads((traces / "horovod.json").read_text())
    names = {event.get("args", {}).get("name", "") for event in horovod}
    assert any("horovod_allreduce" in name for name in names), "each tensor is a row"
    assert {"GLOO_ALLREDUCE"} <= {event.get("name") for event in horovod}


def test_failed_bench_leaves_the_file_as_it_was(tmp_path):
    fresh, kept = tmp_path / "fresh.json", tmp_path / "kept.json"
    kept.write_text("of the last bench")
    for path in (fresh, kept):
        done = run(trainer("bench", "data.folder=/nowhere", "--json", str(path)))
        assert done.code == 2 and "/nowhere" in done.err
    assert {path: path.read_text() for path in tmp_path.iterdir()} == {kept: "of the last bench"}

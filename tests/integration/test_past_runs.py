"""The JSON output of a run on two ranks, and the commands `runs` and `compare`."""

from __future__ import annotations

import json
import re

from trainer import checkpoint

from .commands import ROOT, SMALL, run, trainer
from .conftest import PastRuns

# As docs/monitoring.md has them.
KEYS = {
    "begin": "folder training_samples validation_samples test_samples epochs steps_per_epoch "
    "first_step last_step ranks device global_batch_size batch_norm ema mxnet resumed_from",
    "step": "step epoch epochs loss accuracy lr loss_scale skipped_steps images_per_second "
    "seconds_left",
    "epoch": "step epoch loss accuracy skipped_samples",
    "evaluation": "step set samples loss accuracy",
    "checkpoint": "step path",
    "warning": "message",
    "end": "state step last_step accuracy loss test_accuracy best_accuracy images_per_second "
    "seconds set checkpoint best_checkpoint events next",
}


def test_two_ranks_say_one_json_object_a_line(past_runs: PastRuns) -> None:
    told = [json.loads(line) for line in past_runs.two.out.splitlines()]
    for event in told:
        assert list(event) == ["event", "time", *KEYS[event["event"]].split()]
    # A checkpoint is written in the background, and told when it is there.
    in_order = [event["event"] for event in told if event["event"] != "checkpoint"]
    assert in_order == ["begin", *2 * [*4 * ["step"], "epoch", "evaluation"], "end"]
    assert [e["step"] for e in told if e["event"] == "checkpoint"] == [16, 32]
    assert [e["step"] for e in told if e["event"] == "step"] == list(range(4, 33, 4))
    begin, end, scored = told[0], told[-1], [e for e in told if e["event"] == "evaluation"]
    assert (begin["ranks"], begin["first_step"], begin["last_step"]) == (2, 0, 32)
    assert (end["state"], end["accuracy"]) == ("done", scored[-1]["accuracy"])
    assert end["best_accuracy"] == max(e["accuracy"] for e in scored)
    saved = checkpoint.listing(past_runs.folder / "two" / "checkpoints")
    assert end["checkpoint"] == str(saved[-1]) == told[-2]["path"]


def test_the_documented_keys_are_these() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    for event, keys in KEYS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{event}` |")]
        assert re.findall(r"`(\w+)`", row) == [event, *keys.split()]


def test_runs_lists_them_with_their_figures(past_runs: PastRuns) -> None:
    done = run(trainer("runs", str(past_runs.folder), "--json"))
    default, two = json.loads(done.out)
    assert (default["name"], default["state"], default["step"], default["ranks"]) == (
        *("default", "done", 48),
        1,
    )
    end = json.loads(past_runs.two.out.splitlines()[-1])
    assert {name: two[name] for name in ("name", "state", "ranks", "accuracy", "loss")} == {
        **{"name": "two", "state": "done", "ranks": 2},
        **{name: end[name] for name in ("accuracy", "loss")},
    }
    shown = run(trainer("runs", str(past_runs.folder))).out.splitlines()
    assert [line.split()[0] for line in shown] == ["run", "default", "two"]


def test_compare_shows_in_what_they_differ(past_runs: PastRuns) -> None:
    folders = [str(past_runs.folder / name) for name in ("default", "two")]
    done = run(trainer("compare", *folders))
    lines = [line.split() for line in done.out.splitlines()]
    assert ["batch_norm", "sync", "local"] in lines and ["ranks", "1", "2"] in lines
    assert ["train.epochs", "3", "2"] in lines and not any(line[0] == "seed" for line in lines)


def test_a_folder_without_a_run_is_reported_in_one_line(past_runs: PastRuns) -> None:
    none = str(past_runs.folder / "none")
    for words, said in (
        (["runs", none], f"there is no folder {none}"),
        (["compare", str(past_runs.folder / "two"), none], f"{none} is no run"),
    ):
        done = run(trainer(*words))
        assert done.code == 2 and len(done.err.splitlines()) == 1
        assert done.err.startswith("error: ") and said in done.err


def test_bad_input_is_reported_in_json_too() -> None:
    done = run(trainer("train", *SMALL, "optimizer.lr=-1", "--log-format", "json"))
    (line,) = done.out.splitlines()
    told = json.loads(line)
    assert (told["event"], done.code) == ("error", 2)
    assert done.err == f"error: {told['message']}\n"

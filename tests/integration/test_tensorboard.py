"""The event files, read by the real TensorBoard and queried over HTTP."""

from __future__ import annotations

from pathlib import Path

from trainer.data import fashion_mnist

from .board import TensorBoard
from .commands import SMALL, run, trainer

SCALARS = {
    "loss/train",
    "accuracy/train",
    "optimizer/lr",
    "optimizer/gradient_norm",
    "speed/images_per_second",
    "speed/compute_ms_slowest_rank",
    "system/processor_percent",
    "system/load",
    "system/memory_percent",
    "system/memory_megabytes_largest_rank",
    "loss/epoch",
    "accuracy/epoch",
    "loss/test",
    "accuracy/test",
    "per_class/test/ankle boot",
}
OF_TWO_RANKS = {
    "speed/compute_ms_fastest_rank",
    "speed/slowest_rank",
    "speed/spread_percent",
    "speed/allreduce_ms",
    "speed/waiting_ms",
    "ranks/drift",
    "ranks/drift_worst_layer",
}


def test_scalars_have_each_step_once_although_the_run_was_stopped(board: TensorBoard) -> None:
    name = "default/events"
    for tag in ("loss/train", "optimizer/lr", "optimizer/gradient_norm", "system/load"):
        assert [step for _, step, _ in board.scalars(name, tag)] == list(range(4, 49, 4)), tag
    for tag in ("accuracy/test", "per_class/test/bag"):
        assert [step for _, step, _ in board.scalars(name, tag)] == [16, 32, 48], tag


def test_scalars_are_grouped_and_ranks_compared_where_there_are_several(board: TensorBoard) -> None:
    tags = board.get("plugin/scalars/tags")
    classes = {f"per_class/test/{name}" for name in fashion_mnist.CLASS_NAMES}
    assert set(tags["default/events"]) == SCALARS | classes
    assert set(tags["two/events"]) == SCALARS | classes | OF_TWO_RANKS
    assert all(value > 0 for _, _, value in board.scalars("two/events", "ranks/drift"))
    slowest = board.scalars("two/events", "speed/slowest_rank")
    assert slowest and {value for _, _, value in slowest} <= {0, 1}


def test_pictures_texts_and_the_graph_are_there(board: TensorBoard) -> None:
    images = board.get("plugin/images/tags")["default/events"]
    assert set(images) == {"test/confusion", "test/predictions"}
    texts = board.get("plugin/text/tags")["default/events"]
    assert any("config" in text for text in texts) and any("model" in text for text in texts)
    assert set(board.get("plugin/graphs/info")) >= {"default/events", "two/events"}


def test_weights_and_gradients_are_spread_out_after_each_epoch(board: TensorBoard) -> None:
    for name, steps in (("default/events", [16, 32, 48]), ("two/events", [16, 32])):
        tags = board.get("plugin/histograms/tags")[name]
        groups = {"weights", "weight_gradients"}
        assert {tag.split("/")[0] for tag in tags} == groups and len(tags) == 12
        for group in groups:
            (tag,) = [tag for tag in tags if tag.startswith(group) and tag.endswith("/0.weight")]
            points = board.get("plugin/histograms/histograms", run=name, tag=tag)
            assert [step for _, step, _ in points] == steps


def test_accuracy_and_loss_are_the_first_cards(board: TensorBoard) -> None:
    """Time Series sorts all of its cards by group."""
    plugins = ("scalars", "histograms", "images")
    tags = [tag for name in plugins for tag in board.get(f"plugin/{name}/tags")["two/events"]]
    groups = sorted({tag.split("/")[0] for tag in tags})
    assert groups[:3] == ["accuracy", "loss", "optimizer"], groups


def test_each_class_has_its_precision_and_recall(board: TensorBoard) -> None:
    tags = board.get("plugin/pr_curves/tags")["two/events"]
    assert set(tags) == {f"test/{name}" for name in fashion_mnist.CLASS_NAMES}
    answer = board.get("plugin/pr_curves/pr_curves", tag="test/bag", run="two/events")
    (last,) = answer["two/events"][-1:]
    assert last["true_positives"][0] == 50  # with the threshold 0, all of the sample's bags
    assert last["false_positives"][0] == 450


def test_each_finished_run_is_listed_once(board: TensorBoard) -> None:
    assert sorted(board.get("runs")) == ["default/events", "two/events"]


def test_rank_0_alone_writes(tmp_path: Path) -> None:
    settings = [*SMALL, "train.max_steps=4", f"output={tmp_path}"]
    done = run(trainer("train", *settings, ranks=3))
    assert done.code == 0, done.err
    assert len(list(tmp_path.glob("default/events/events.*"))) == 1
    run_folder = tmp_path / "default"
    files = [path.name for path in run_folder.rglob("*") if path.is_file()]
    assert sorted(name for name in files if "tfevents" not in name) == [
        "config.yaml",
        "manifest.json",
        "model.params",
        "optimizer.params",
        "result.json",
        "state.json",
    ]

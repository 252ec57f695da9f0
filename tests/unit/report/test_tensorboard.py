"""Event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer import dist
from trainer.config import Config, Model, Schedule
from trainer.report.figures import Predicted, confusion_figure, prediction_figure
from trainer.report.report import Report
from trainer.report.tensorboard import CONFUSION_CLASSES, HISTOGRAM_VALUES, Monitor
from trainer.step.evaluation import THRESHOLDS, Evaluation
from trainer.step.metrics import Means

NAMES = ["t-shirt", "trouser", "ankle boot"]


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def points(folder: Path, tag: str) -> list:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def test_scalars_come_back_at_their_steps(tmp_path):
    monitor = Monitor(tmp_path, 0)
    for step in (20, 40):
        monitor.scalars({"loss/train": step / 100, "optimizer/lr": 0.5}, step)
    monitor.close()
    assert points(tmp_path, "loss/train") == [(20, pytest.approx(0.2)), (40, pytest.approx(0.4))]
    assert sorted(read(tmp_path).Tags()["scalars"]) == ["loss/train", "optimizer/lr"]


def test_flush_puts_everything_into_the_files(tmp_path):
    monitor = Monitor(tmp_path, 0)
    monitor.scalars({"loss/train": 1.0}, 1)
    monitor.flush()
    assert points(tmp_path, "loss/train") == [(1, 1.0)]
    monitor.close()


def test_points_are_in_the_files_when_they_are_flushed_not_when_a_thread_finds_time(tmp_path):
    """A run that is killed right after a checkpoint must not lose what it has seen."""
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from trainer.report.tensorboard import Monitor\n"
        "monitor = Monitor(Path(sys.argv[1]), 0)\n"
        "for step in range(1, 31): monitor.scalars({'loss/train': 1.0}, step)\n"
        "monitor.flush()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False)
    assert [step for step, _ in points(tmp_path, "loss/train")] == list(range(1, 31))


def run(folder: Path, first_step: int, last_step: int, value: float) -> None:
    monitor = Monitor(folder, first_step)
    monitor.start(Config(), "layers")
    for step in range(first_step + 1, last_step + 1):
        monitor.scalars({"loss/train": value}, step)
        if step % 3 == 0:
            monitor.scalars({"accuracy/test": value}, step)
    monitor.close()


def test_resumed_run_has_each_step_once(tmp_path):
    """Killed at step 8, its last checkpoint at 6; killed again at 7, before the next."""
    run(tmp_path, 0, 8, 1.0)
    run(tmp_path, 6, 7, 2.0)
    run(tmp_path, 6, 12, 3.0)
    assert points(tmp_path, "loss/train") == [
        *((step, 1.0) for step in range(1, 7)),
        *((step, 3.0) for step in range(7, 13)),
    ]
    assert points(tmp_path, "accuracy/test") == [(3, 1.0), (6, 1.0), (9, 3.0), (12, 3.0)]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "is_root", lambda: False)
    config = Config(output=str(tmp_path / "runs"))
    report = Report(config, 1, 0, 1, NAMES)
    net = nn.Dense(1)
    report.begin({"training": 1}, mx.cpu(), None, [], net)
    report.training(1, Means(0.5, 0.5), 0.1, None, None, {})
    report.epoch(1, Means(0.5, 0.5), 0)
    report.evaluation(1, evaluation(), "test", grid())
    report.drift(1, {"drift": 0.5})
    report.end(1, "done", evaluation(), None)
    report.close()
    assert not (tmp_path / "runs").exists()


def test_other_ranks_do_not_load_tensorboardx():
    code = (
        "import sys, mxnet as mx\n"
        "from trainer import dist\n"
        "from trainer.config import Config\n"
        "from trainer.report.report import Report\n"
        "dist.is_root = lambda: False\n"
        "Report(Config(), 1, 0, 1, []).drift(1, {'drift': 0.5})\n"
        "sys.exit('tensorboardX' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_config_and_layers_are_texts(tmp_path):
    monitor = Monitor(tmp_path, 0)
    monitor.start(Config(name="mine", seed=77), "| layer | kind |")
    monitor.close()
    accumulator = read(tmp_path)

    def text(tag):
        (event,) = accumulator.Tensors(f"{tag}/text_summary")
        return event.tensor_proto.string_val[0].decode()

    assert "    name: mine" in text("config") and "    seed: 77" in text("config")
    assert text("model") == "| layer | kind |"


def evaluation() -> Evaluation:
    confusion = np.array([[5, 0, 1], [0, 4, 0], [2, 0, 0]])
    return Evaluation(loss=0.25, accuracy=0.75, confusion=confusion, samples=12)


def grid(count: int = 11) -> Predicted:
    random = np.random.RandomState(0)
    labels, predicted = random.randint(0, 3, (2, count))
    return Predicted(random.randint(0, 256, (count, 28, 28), np.uint8), labels, predicted)


def picture(folder: Path, tag: str) -> tuple:
    (event,) = read(folder).Images(tag)
    assert event.encoded_image_string.startswith(b"\x89PNG")
    assert event.width > 100 and event.height > 100
    return event.step


@pytest.mark.parametrize("group", ["test", "validation"])
def test_an_evaluation_is_figures_and_pictures(tmp_path, group):
    report = Report(Config(output=str(tmp_path), name="run"), 1, 0, 468, NAMES)
    report.evaluation(468, evaluation(), group, None)
    report.close()
    events = tmp_path / "run" / "events"
    assert points(events, f"loss/{group}") == [(468, 0.25)]
    assert points(events, f"accuracy/{group}") == [(468, 0.75)]
    assert picture(events, f"{group}/confusion") == 468
    assert read(events).Tags()["images"] == [f"{group}/confusion"], "no image could be read"


@pytest.mark.parametrize("count", [1, 8, 11])
def test_predictions_are_a_picture(tmp_path, count):
    monitor = Monitor(tmp_path, 0)
    monitor.evaluation(evaluation(), grid(count), NAMES, 5, "test")
    monitor.close()
    assert picture(tmp_path, "test/predictions") == 5


def test_predictions_name_what_was_wrong():
    images = np.zeros((2, 28, 28), np.uint8)
    shown = Predicted(images, np.array([0, 1]), np.array([0, 2]))
    figure = prediction_figure(shown, NAMES)
    titles = figure.axes[0].texts
    assert [title.get_text() for title in titles] == ["t-shirt", "trouser\nnot ankle boot"]
    assert [title.get_color() for title in titles] == ["black", "red"]
    (frame,) = figure.axes[0].patches
    assert frame.get_xy() == (29.5, 11.5), "round the second image"


@pytest.mark.parametrize(("channels", "shown"), [((), ()), ((3,), (3,)), ((1,), ()), ((4,), ())])
def test_predictions_show_colours_where_there_are_three(channels, shown):
    images = np.full((2, 28, 28, *channels), 7, np.uint8)
    figure = prediction_figure(Predicted(images, np.array([0, 1]), np.array([0, 2])), NAMES)
    (picture,) = figure.axes[0].images
    assert picture.get_array().shape[2:] == shown
    assert (picture.get_array() == 7).sum() == 2 * 28 * 28 * (*shown, 1)[0]


def test_confusion_is_in_percent_of_each_true_class():
    (axes,) = confusion_figure(evaluation().confusion, NAMES).axes
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown[(0, 0)] == "83" and shown[(2, 0)] == "17"  # (column, row)
    assert shown[(0, 2)] == "100" and (2, 2) not in shown
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES


def test_class_without_samples_and_many_classes_are_no_error():
    confusion_figure(np.zeros((3, 3), np.int64), NAMES)
    (axes,) = confusion_figure(np.eye(30, dtype=np.int64), [str(i) for i in range(30)]).axes
    assert not axes.texts
    many = [str(i) for i in range(300)]
    (axes,) = confusion_figure(np.eye(300, dtype=np.int64), many).axes
    assert len(axes.get_xticks()) < 20 and len(axes.get_yticks()) < 20


def test_hyper_parameters_are_in_the_run_itself(tmp_path):
    """A folder of their own would be a second run in TensorBoard's lists."""
    config = Config(
        schedule=Schedule("step", milestones=(1.0, 2.0)), model=Model(arguments={"stem": "small"})
    )
    monitor = Monitor(tmp_path, 0)
    monitor.hyper_parameters(config, 2)
    monitor.close()
    (file,) = tmp_path.iterdir()
    assert file.is_file()
    content = read(tmp_path).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    for part in (b"optimizer.lr", b"schedule.milestones", b"train.epochs", b"model.arguments.stem"):
        assert part in content
    assert b"ranks" in content and b"output" not in content and b"monitor" not in content


def test_each_class_has_its_accuracy_and_its_curve(tmp_path):
    counts = np.zeros((2, 3, THRESHOLDS), np.int64)
    counts[1, 0, [0, 126]] = 1, 3  # of four t-shirts three were certain
    counts[0, 0, 126] = 1  # and so was something else
    monitor = Monitor(tmp_path, 0)
    monitor.evaluation(evaluation()._replace(score_counts=counts), None, NAMES, 5, "test")
    monitor.close()
    assert points(tmp_path, "per_class/test/t-shirt") == [(5, pytest.approx(5 / 6))]
    assert points(tmp_path, "per_class/test/ankle boot") == [(5, 0.0)]
    (event,) = read(tmp_path).Tensors("test/t-shirt")
    curve = np.array(event.tensor_proto.float_val).reshape(6, THRESHOLDS)
    np.testing.assert_allclose(curve[:, 126], [3, 1, 0, 1, 0.75, 0.75])


def test_classes_named_by_signs_have_curves_of_their_own(tmp_path, caplog):
    monitor = Monitor(tmp_path, 0)
    monitor.evaluation(evaluation(), None, ["+", "-", "a b"], 5, "test")
    monitor.scalars({"loss/test": float("nan")}, 5)
    monitor.close()
    assert points(tmp_path, "per_class/test/+") == [(5, pytest.approx(5 / 6))]
    assert points(tmp_path, "per_class/test/-") != points(tmp_path, "per_class/test/+")
    assert len(points(tmp_path, "per_class/test/a b")) == 1 and not caplog.records


def test_many_classes_have_no_curves(tmp_path):
    confusion = np.eye(30, dtype=np.int64)
    counts = np.ones((2, 30, THRESHOLDS), np.int64)
    monitor = Monitor(tmp_path, 0)
    seen = Evaluation(1.0, 1.0, confusion, 30, counts)
    monitor.evaluation(seen, None, [str(label) for label in range(30)], 5, "test")
    monitor.close()
    tags = read(tmp_path).Tags()
    assert tags["images"] == ["test/confusion"] and not tags["scalars"] and not tags["tensors"]


def test_histograms_hold_the_values_of_large_arrays_thinned_and_of_none_that_is_not_finite(
    tmp_path,
):
    random = np.random.RandomState(0)
    large = random.normal(3, 1, (HISTOGRAM_VALUES, 5)).astype(np.float32)
    monitor = Monitor(tmp_path, 0)
    arrays = {
        "large": large,
        "zero": np.zeros(4),
        "bad": np.array([np.nan, 1, 2]),
        "none": [np.inf],
    }
    monitor.histograms("weights", {name: np.array(a) for name, a in arrays.items()}, 7)
    monitor.close()
    accumulator = read(tmp_path)
    found = {
        tag: accumulator.Histograms(tag)[0].histogram_value
        for tag in accumulator.Tags()["histograms"]
    }
    assert sorted(found) == ["weights/bad", "weights/large", "weights/zero"]
    assert (found["weights/bad"].num, found["weights/bad"].max) == (2, 2)
    assert found["weights/large"].num == HISTOGRAM_VALUES
    assert found["weights/large"].sum / HISTOGRAM_VALUES == pytest.approx(large.mean(), abs=0.02)


def test_the_layout_names_tags_that_are_written(tmp_path):
    monitor = Monitor(tmp_path, 0)
    monitor.start(Config(), "layers")
    monitor.close()
    (event,) = read(tmp_path).Tensors("custom_scalars__config__")
    content = event.tensor_proto.string_val[0]
    for part in (b"ranks/drift.*", b"loss/.*", b"accuracy/.*", b"speed/compute_ms_.*"):
        assert part in content


def test_histograms_of_a_net_that_is_made_anew_have_the_same_tags(tmp_path):
    """As in the process of a notebook, where Gluon goes on counting layers."""
    tags = []
    for name in ("a", "b"):
        net = nn.HybridSequential()
        net.add(nn.Dense(2, in_units=3), nn.BatchNorm(in_channels=2))
        net.initialize()
        trainer = mx.gluon.Trainer(net.collect_params(), "sgd")
        with mx.autograd.record():
            loss = net(mx.nd.ones((1, 3))).sum()
        loss.backward()
        report = Report(Config(output=str(tmp_path), name=name), 1, 0, 1, NAMES)
        report.parameters(1, net, trainer)
        report.close()
        tags.append(sorted(read(tmp_path / name / "events").Tags()["histograms"]))
    groups = ("weight_gradients", "weights")
    moved = ("0.bias", "0.weight", "1.beta", "1.gamma")
    assert tags[0] == tags[1] == [f"{group}/{name}" for group in groups for name in moved]


def test_more_classes_than_a_figure_has_pixels_have_none(tmp_path):
    monitor = Monitor(tmp_path, 0)
    confusion = np.eye(CONFUSION_CLASSES + 1, dtype=np.int64)
    seen = Evaluation(1.0, 1.0, confusion, len(confusion))
    monitor.evaluation(seen, None, [str(label) for label in range(len(confusion))], 5, "test")
    monitor.close()
    assert not read(tmp_path).Tags()["images"]

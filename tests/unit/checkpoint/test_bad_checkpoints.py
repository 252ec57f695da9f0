"""Damaged checkpoints are refused in one line, and strange run folders overwrite nothing.

Damage is drawn: bytes flipped, files cut, values swapped, also where the sums of a checkpoint are
made right again afterwards, so that its content is all that can tell.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mxnet as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mxnet.gluon import nn

from tests.bad_input import JSON, damage, one_line
from trainer import checkpoint
from trainer.checkpoint import RunState, params_file, resume, run_folder
from trainer.checkpoint.saver import Saver
from trainer.config import Config, Optimizer, to_dict
from trainer.errors import ConfigError
from trainer.inference import trained_model
from trainer.report.tensorboard import Monitor
from trainer.run import outcome
from trainer.step.metrics import NonFiniteError
from trainer.step.optimizer import make_trainer

STATE = RunState(totals=[[1.0, 2.0, 3.0]] * 2, accuracy=0.5, config=to_dict(Config()))
KEPT = "the older ones are as they were"


def make_run() -> SimpleNamespace:
    net = nn.HybridSequential()
    net.add(nn.Dense(4, in_units=5), nn.BatchNorm(in_channels=4), nn.Dense(3, in_units=4))
    net.initialize()
    trainer = make_trainer(net, Optimizer())
    with mx.autograd.record():
        loss = net(mx.nd.ones((2, 5))).sum()
    loss.backward()
    trainer.step(2)
    return SimpleNamespace(net=net, trainer=trainer)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run and two checkpoints of it, with the statistics of two ranks."""
    made = make_run()
    made.folder = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (1, 2):
        state = replace(STATE, step=step)
        statistics = mx.nd.ones((2, 8)).asnumpy()
        content = checkpoint.snapshot(made.net, made.trainer, state, statistics)
        checkpoint.write(made.folder, content)
    return made


@pytest.fixture
def newest(run, tmp_path):
    """The newer one, to be damaged; the older is beside it."""
    shutil.copytree(str(run.folder), str(tmp_path / "checkpoints"))
    return tmp_path / "checkpoints" / "step-00000002"


def seal(path: Path) -> None:
    """Make the sums of a damaged checkpoint right."""
    names = (checkpoint.PARAMETERS, checkpoint.OPTIMIZER, checkpoint.STATE)
    sums = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    (path / checkpoint.MANIFEST).write_text(json.dumps(sums))


def use(run, path: Path) -> None:
    """All that is done with a checkpoint; by rights each ends in a line or works."""
    wrong = checkpoint.problem(path)
    if wrong is not None:
        one_line(ValueError(wrong))
        told = []
        assert checkpoint.find_latest(path.parent, told.append).name == "step-00000001"
        assert len(told) == 1
    checkpoint.find_best(path.parent)
    for force in (False, True):
        try:
            resume.choose(Config(), str(path), force)
        except checkpoint.CheckpointError as error:
            one_line(error)
        else:
            assert wrong is None
    if wrong is None:
        try:
            checkpoint.restore(path, run.net, run.trainer)
        except checkpoint.CheckpointError as error:
            one_line(error)
        mx.nd.waitall()


@settings(max_examples=100)
@given(
    name=st.sampled_from([checkpoint.PARAMETERS, checkpoint.OPTIMIZER, checkpoint.STATE]),
    spoil=damage(),
)
def test_damaged_content_under_right_sums(run, newest, name, spoil):
    before = (newest / name).read_bytes()
    try:
        (newest / name).write_bytes(spoil(before))
        seal(newest)
        use(run, newest)
    finally:
        (newest / name).write_bytes(before)


@settings(max_examples=100)
@given(data=st.data(), value=JSON)
def test_any_value_in_a_state_under_right_sums(run, newest, data, value):
    text = (newest / checkpoint.STATE).read_text()
    state = json.loads(text)
    inner = state
    key = data.draw(st.sampled_from(sorted(inner)))
    while isinstance(inner[key], dict) and inner[key] and data.draw(st.booleans()):
        inner = inner[key]
        key = data.draw(st.sampled_from(sorted(inner)))
    if data.draw(st.booleans()):
        inner[key] = value
    elif data.draw(st.booleans()):
        inner[data.draw(st.text(max_size=4))] = value
    else:
        del inner[key]
    try:
        (newest / checkpoint.STATE).write_text(json.dumps(state))
        seal(newest)
        use(run, newest)
    finally:
        (newest / checkpoint.STATE).write_text(text)


def rewritten(path: Path, change) -> None:
    """The arrays of a checkpoint's file as ``change`` leaves them, under right sums."""
    arrays = mx.nd.load(str(path))
    change(arrays)
    mx.nd.save(str(path), arrays)
    seal(path.parent)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("0.weight.0"),
        lambda arrays: [arrays.pop(name) for name in list(arrays) if name != "statistics"],
        lambda arrays: arrays.update({"0.weight.1": mx.nd.ones((4, 5))}),
        lambda arrays: arrays.update({"0.weight.0": mx.nd.ones((5, 4))}),
        lambda arrays: arrays.pop("statistics"),
    ],
    ids=["one less", "none", "one more", "another shape", "no statistics"],
)
def test_other_optimizer_arrays_than_were_saved_make_a_checkpoint_bad(run, newest, change):
    rewritten(newest / checkpoint.OPTIMIZER, change)
    wrong = checkpoint.problem(newest)
    assert (
        wrong == f"{newest / checkpoint.OPTIMIZER} does not hold the arrays that state.json lists"
    )
    use(run, newest)


@pytest.mark.parametrize("file", [checkpoint.OPTIMIZER, checkpoint.PARAMETERS])
def test_nan_makes_a_checkpoint_bad_and_not_the_last_good_one(run, newest, file):
    """Resumed, it would have blamed the learning rate, and called itself the last good one."""
    key = "0.weight.0" if file == checkpoint.OPTIMIZER else "0.weight"
    rewritten(newest / file, lambda arrays: arrays[key].__setitem__(0, np.nan))
    assert checkpoint.problem(newest) == f"{newest / file} cannot be used: {key} holds NaN"
    use(run, newest)
    folder = newest.parents[1]
    settings_ = Config(output=str(folder.parent), name=folder.name)
    told = str(outcome.not_finite(settings_, NonFiniteError(3, "the loss was not finite")))
    assert f"the last good checkpoint is {newest.parent / 'step-00000001'}" in told


def test_a_checkpoint_of_an_optimizer_whose_arrays_were_not_recorded_is_whole(newest):
    state = json.loads((newest / checkpoint.STATE).read_text())
    del state["optimizer"]["shapes"]
    (newest / checkpoint.STATE).write_text(json.dumps(state))
    seal(newest)
    assert checkpoint.problem(newest) is None


def test_statistics_of_another_net_are_refused_with_the_way_out(run, tmp_path):
    """Such as those of a run with frozen weights, which once were among them."""
    content = checkpoint.snapshot(run.net, run.trainer, replace(STATE, step=1), np.zeros((2, 99)))
    path = checkpoint.write(tmp_path, content)
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.restore(path, run.net, run.trainer)
    assert "anew with --resume none" in one_line(error.value)


def test_file_that_would_end_the_process_is_refused(run, newest):
    """An array of -1 dimensions is a segmentation fault in MXNet."""
    path = newest / checkpoint.PARAMETERS
    content = bytearray(path.read_bytes())
    assert struct.unpack_from("<i", content, 32) == (2,)
    struct.pack_into("<i", content, 32, -1)
    path.write_bytes(content)
    assert params_file.problem(path) == "array 0 is not a dense array"
    seal(newest)
    with pytest.raises(checkpoint.CheckpointError, match="cannot be used"):
        checkpoint.load_parameters(newest, run.net)


@pytest.mark.parametrize("name", [checkpoint.PARAMETERS, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("how", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_read(newest, name, how):
    """Reading it would never end."""
    (newest / name).unlink()
    how(newest / name)
    code = "import sys, pathlib; from trainer import checkpoint as c\n"
    code += "print(c.problem(pathlib.Path(sys.argv[1])))"
    limited = ["bash", "-c", 'ulimit -v 8000000; exec "$@"', "bash"]
    command = [*limited, sys.executable, "-c", code, newest]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{newest / name} is missing\n", done.stderr
    code = "import sys, pathlib; from trainer import checkpoint as c\n"
    code += "print(c.find_best(pathlib.Path(sys.argv[1]).parent))"
    command = [*limited, sys.executable, "-c", code, newest]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    best = newest if name != checkpoint.STATE else newest.parent / "step-00000001"
    assert done.stdout == f"{best}\n", done.stderr


def test_a_folder_without_a_model_to_evaluate_is_reported_in_one_line(newest, tmp_path):
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    (newest / checkpoint.PARAMETERS).write_bytes(b"")
    for where, words in (
        (tmp_path / "none", "there is no folder"),
        (tmp_path / "new", "holds no checkpoint yet"),
        (tmp_path, "model.params is damaged"),
        (newest, "model.params is damaged"),
    ):
        with pytest.raises(checkpoint.CheckpointError) as error:
            trained_model.load(str(where))
        assert words in one_line(error.value) and str(where) in str(error.value)


@settings(max_examples=30)
@given(
    shapes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=4),
    kind=st.sampled_from(["float32", "float64", "float16", "uint8", "int32", "int8", "int64"]),
)
def test_whole_files_are_whole_and_cut_ones_are_not(tmp_path, shapes, kind):
    path = tmp_path / "arrays"
    mx.nd.save(str(path), {f"ä{i}": mx.nd.ones(s, dtype=kind) for i, s in enumerate(shapes)})
    assert params_file.problem(path) is None
    content = path.read_bytes()
    for end in {0, 7, 23, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:end])
        assert params_file.problem(path) is not None


# ---------------------------------------------------------------- the run's folder


@pytest.mark.parametrize("place", [".", "run", "run/checkpoints", "run/events", "run/config.yaml"])
def test_strange_things_in_the_run_folder(tmp_path, place):
    """A file where a folder should be, a folder where a file should be."""
    output = tmp_path / "runs"
    strange = output / place
    strange.parent.mkdir(parents=True, exist_ok=True)
    if place == "run/config.yaml":
        (strange / "mine").mkdir(parents=True)
    else:
        strange.write_text("mine")
    settings_ = Config(output=str(output), name="run")
    start = settings_.checkpoint_folder / "step-00000001"
    with pytest.raises(ConfigError) as error, run_folder.usable(
        settings_.folder
    ), run_folder.taken_folder(settings_, start):
        Monitor(settings_.folder / "events", 0)
    assert str(tmp_path) in one_line(error.value)
    assert (strange / "mine").is_dir() if strange.is_dir() else strange.read_text() == "mine"


@pytest.fixture
def disk(tmp_path):
    """A file system of its own; how to mount it anew, e.g. read-only."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=1m", *options]), "tmpfs"]
        subprocess.run([*command, str(folder)], check=True)

    mount()
    yield SimpleNamespace(folder=folder, mount=mount)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_read_only_folder(run, disk):
    """Nothing is begun there; a run that is under way goes on, and has what it had."""
    settings_ = Config(output=str(disk.folder), name="run")
    with run_folder.taken_folder(settings_, None):
        pass
    folder, told = settings_.checkpoint_folder, []
    saver = Saver(folder, 1, told.append)
    content = checkpoint.snapshot(run.net, run.trainer, replace(STATE, step=1))
    saver.begin(content)
    assert saver.wait() is None
    disk.mount("remount", "ro")
    saver.begin(content._replace(state=replace(content.state, step=2)))
    failure = saver.wait()
    assert failure and "Read-only file system" in failure and told == [f"{failure}; " + KEPT]
    assert checkpoint.find_latest(folder, pytest.fail).name == "step-00000001"
    with pytest.raises(ConfigError, match="Read-only file system"), run_folder.usable(
        folder
    ), run_folder.taken_folder(settings_, folder / "step-00000001"):
        pass


def test_folders_on_other_devices(run, disk, tmp_path):
    """Checkpoints may lie on another disk, or a run; but one that is a disk cannot be set aside."""
    (tmp_path / "runs" / "linked").mkdir(parents=True)
    (tmp_path / "runs" / "linked" / "checkpoints").symlink_to(disk.folder)
    settings_ = Config(output=str(tmp_path / "runs"), name="linked")
    start = settings_.checkpoint_folder / "step-00000001"
    with run_folder.taken_folder(settings_, start):
        pass
    content = checkpoint.snapshot(run.net, run.trainer, replace(STATE, step=1))
    path = checkpoint.write(settings_.checkpoint_folder, content)
    assert checkpoint.problem(path) is None and (disk.folder / path.name).is_dir()
    mounted = Config(output=str(tmp_path), name="disk")
    with run_folder.taken_folder(mounted, None):
        assert (disk.folder / "config.yaml").is_file()
    with pytest.raises(ConfigError) as error, run_folder.usable(
        mounted.folder
    ), run_folder.taken_folder(mounted, None):
        pass
    assert "busy" in one_line(error.value) and (disk.folder / path.name).is_dir()


def test_strange_event_files_are_left_alone(tmp_path):
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"\xff" * 99)
    monitor = Monitor(tmp_path, 5)
    monitor.scalars({"loss/train": 1.0}, 6)
    monitor.close()
    assert (tmp_path / "events.out.tfevents.1.host").read_bytes() == b"\xff" * 99
    assert len(list(tmp_path.iterdir())) == 2

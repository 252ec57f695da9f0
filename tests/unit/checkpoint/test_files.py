"""Checkpoints are exact, complete or absent, and not used when damaged."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mxnet.gluon import nn

from trainer import checkpoint
from trainer.checkpoint import (
    CheckpointError,
    RunState,
    SaveError,
    files,
    find_best,
    find_latest,
    listing,
    optimizer_state,
    problem,
    restore,
)
from trainer.checkpoint.files import Restored
from trainer.config import Optimizer
from trainer.model import ema
from trainer.step.optimizer import make_trainer

from .runs import FILES, TOTALS, Run, assert_same, one_line

# Without the one for MXNet's own tests, and the one that takes matrices only.
OPTIMIZERS = sorted(set(mx.optimizer.Optimizer.opt_registry) - {"test", "groupadagrad"})


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize(
    "name, settings",
    [
        ("sgd", {}),
        ("sgd", {"momentum": 0.0}),
        ("sgd", {"nesterov": True}),
        ("sgd", {"clip_norm": 0.5, "accumulate": 2}),
        ("adam", {"ctx": mx.cpu(1)}),
        ("lars", {"arguments": {"momentum": 0.9}}),
        *((name, {}) for name in OPTIMIZERS if name != "sgd"),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, name, settings):
    uninterrupted = Run(name, **settings).train(0, 7)
    stopped = Run(name, **settings).train(0, 4)
    path = stopped.save(tmp_path, 4)
    resumed = Run(name, seed=99, **settings)
    state = restore(path, resumed.net, resumed.trainer).state
    given = {"step": 4, "totals": TOTALS, "accuracy": None, "config": {"seed": 1}}
    assert {key: getattr(state, key) for key in given} == given
    assert resumed.trainer.optimizer.num_update == stopped.trainer.optimizer.num_update == 4
    assert_same(resumed.arrays(), stopped.arrays())
    assert_same(resumed.train(4, 7).arrays(), uninterrupted.arrays())


def test_layers_made_before_in_the_process_do_not_matter(tmp_path):
    """Gluon counts layers over all nets and its trainer sorts by these names: dense10 < dense9."""
    stopped = Run(names=("dense9_", "dense10_")).train(0, 3)
    path = stopped.save(tmp_path, 3)
    resumed = Run(seed=9, names=("dense1_", "dense2_"))
    restore(path, resumed.net, resumed.trainer)
    for run in (stopped, resumed):
        run.train(3, 5)
    found = [run.net._collect_params_with_prefix() for run in (stopped, resumed)]
    for name, parameter in found[0].items():
        assert (parameter.data().asnumpy() == found[1][name].data().asnumpy()).all(), name


def test_parameter_that_gluon_would_not_save_is_reported():
    class Hidden(nn.HybridBlock):
        def __init__(self):
            super().__init__()
            self.params.get("weight", shape=(1,))

    net = Hidden()
    net.initialize()
    with pytest.raises(ValueError, match=r"hidden0_weight is no attribute of its block"):
        optimizer_state.broadcast(net, make_trainer(net, Optimizer()))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_running_statistics_of_each_rank_come_back(tmp_path, trained, dtype):
    statistics = np.random.RandomState(0).normal(size=(3, 8)).astype(dtype)
    state = RunState(step=1, totals=TOTALS)
    content = checkpoint.snapshot(trained.net, trained.trainer, state, statistics)
    path = checkpoint.write(tmp_path, content)
    other = Run(seed=1)
    restored = restore(path, other.net, other.trainer).statistics
    assert restored.dtype == dtype and restored.tobytes() == statistics.tobytes()
    assert_same(other.arrays(), trained.arrays())


def test_saving_changes_nothing_in_the_run(tmp_path):
    run, other = Run("adam").train(0, 2), Run("adam").train(0, 2)
    run.save(tmp_path, 2)
    assert_same(run.train(2, 4).arrays(), other.train(2, 4).arrays())


@pytest.mark.parametrize("name", ["adam", "lars"])
def test_checkpoint_before_the_first_step(tmp_path, name):
    path = Run(name).save(tmp_path, 0)
    resumed = Run(name, seed=9)
    restore(path, resumed.net, resumed.trainer)
    assert_same(resumed.train(0, 3).arrays(), Run(name).train(0, 3).arrays())


def test_numbers_of_an_optimizer_of_ones_own_are_restored(tmp_path, monkeypatch):
    class Decaying(mx.optimizer.Optimizer):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.decay = 1.0

        def update(self, index, weight, gradient, state):
            self._update_count(index)
            self.decay *= 0.9
            self.seen = getattr(self, "seen", 0) + 1
            weight -= self._get_lr(index) * self.decay / self.seen * self.rescale_grad * gradient

    monkeypatch.setitem(mx.optimizer.Optimizer.opt_registry, "decaying", Decaying)
    for steps in (0, 3):
        path = Run("decaying").train(0, steps).save(tmp_path, steps)
        resumed = Run("decaying", seed=9)
        restore(path, resumed.net, resumed.trainer)
        assert_same(resumed.train(steps, 5).arrays(), Run("decaying").train(0, 5).arrays())


def test_parameters_load_with_gluon_itself(tmp_path, trained):
    path = trained.save(tmp_path, 3)
    other = Run(seed=5)
    other.net.load_parameters(str(path / "model.params"))
    for name, parameter in other.net._collect_params_with_prefix().items():
        expected = trained.net._collect_params_with_prefix()[name].data().asnumpy()
        assert (parameter.data().asnumpy() == expected).all()


def test_weights_just_used_for_inference_are_saved_as_they_are(tmp_path):
    """oneDNN lays convolution weights out anew in inference; files must not show it."""
    mx.random.seed(0)
    net = nn.HybridSequential()
    net.add(nn.Conv2D(64, 3, in_channels=64), nn.Conv2D(64, 3, in_channels=64))
    net.initialize(mx.init.Normal(1))
    expected = [p.data().asnumpy() for p in net.collect_params().values()]
    trainer = make_trainer(net, Optimizer())
    net(mx.nd.ones((1, 64, 8, 8)))
    path = checkpoint.write(tmp_path, checkpoint.snapshot(net, trainer, RunState(step=1)))
    saved = mx.nd.load(str(path / "model.params"))
    for value, name in zip(expected, net._collect_params_with_prefix()):
        assert (saved[name].asnumpy() == value).all()


def test_nothing_is_pickled_or_unpickled(tmp_path, monkeypatch, trained):
    def refuse(*_, **__):
        raise AssertionError("pickle is used")

    other = Run(seed=1)
    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    path = trained.save(tmp_path, 3)
    assert find_latest(tmp_path, refuse) == path
    restore(path, other.net, other.trainer)


def kept(run: Run, folder: Path, **more) -> Path:
    """A checkpoint with what the net does not hold: each rank's statistics, weights beside EMA."""
    content = checkpoint.snapshot(run.net, run.trainer, RunState(step=1), **more)
    return checkpoint.write(folder, content)


def test_what_the_net_does_not_hold_comes_back(tmp_path, trained):
    """Under names that checkpoints of earlier versions have too."""
    rows, averaged = (np.arange(16, dtype=np.float32).reshape(2, 8) + n for n in (0, 1))
    others = {ema.TRAINED + "0.weight": mx.nd.ones((4, 5))}
    path = kept(trained, tmp_path, statistics=rows, averaged=averaged, others=others)
    assert problem(path) is None
    arrays = mx.nd.load(str(path / "optimizer.params"))
    assert {"statistics", "averaged statistics", *others} < set(arrays)
    shapes = checkpoint.read_state(path).optimizer["shapes"]
    assert shapes == {name: list(array.shape) for name, array in arrays.items()}
    other = Run(seed=3)
    found = restore(path, other.net, other.trainer)
    np.testing.assert_array_equal(found.statistics, rows)
    np.testing.assert_array_equal(found.averaged, averaged)
    assert [*found.others] == [*others]
    np.testing.assert_array_equal(found.others[ema.TRAINED + "0.weight"].asnumpy(), 1)


def test_an_optimizer_without_arrays_leaves_a_number_in_its_file(tmp_path):
    run = Run(momentum=0.0).train(0, 1)
    path = run.save(tmp_path, 1)
    (number,) = mx.nd.load(str(path / "optimizer.params")).items()
    assert number[0] == "none" and number[1].asnumpy().tolist() == [0]
    assert restore(path, run.net, run.trainer)[1:] == (None, None, {})


def test_what_mxnet_cannot_load_is_told_in_a_line(tmp_path, trained, monkeypatch):
    path = trained.save(tmp_path, 3)

    def fails(name):
        raise mx.MXNetError("odd\nStack trace")

    monkeypatch.setattr(mx.nd, "load", fails)
    assert problem(path) in [f"{path / name} cannot be used: odd" for name in FILES[1:3]]


def test_nothing_restored_is_nothing_done():
    assert tuple(Restored()) == (RunState(), None, None, {})


# ---------------------------------------------------------------- what does not fit

ANEW = "; give the run another name=..., or start it anew with --resume none"


@pytest.mark.parametrize(
    "more",
    [
        {"statistics": np.zeros((2, 7), np.float32)},
        {"averaged": np.zeros((2, 9), np.float32)},
        {"others": {ema.TRAINED + "0.weight": mx.nd.ones((5, 4))}},
        {"others": {ema.TRAINED + "9.weight": mx.nd.ones((4, 5))}},
    ],
)
def test_what_the_net_does_not_hold_must_fit_it(tmp_path, trained, more):
    path = kept(trained, tmp_path, **more)
    other = Run(seed=3)
    with pytest.raises(CheckpointError) as error:
        restore(path, other.net, other.trainer)
    assert one_line(error) == f"{path}: its running statistics do not fit this net{ANEW}"


def test_other_optimizer_is_named(tmp_path, trained):
    path = trained.save(tmp_path, 3)
    other = Run("adam")
    with pytest.raises(CheckpointError) as error:
        restore(path, other.net, other.trainer)
    text = one_line(error)
    assert text.startswith(f"{path}: ") and "SGD" in text and "Adam" in text
    assert text.endswith(ANEW)


def test_other_net_is_reported(tmp_path, trained):
    path = trained.save(tmp_path, 3)
    other = Run(units=7)
    with pytest.raises(CheckpointError) as error:
        restore(path, other.net, other.trainer)
    assert str(path) in one_line(error)


def test_net_with_other_layers_is_reported(tmp_path, trained):
    path = trained.save(tmp_path, 3)
    net = nn.HybridSequential()
    net.add(nn.Dense(3, in_units=5))
    net.initialize()
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_parameters(path, net)
    text = one_line(error)
    assert text.startswith(f"{path} does not fit this net: ") and text.endswith(
        "; name the one it was made with, by model.factory and model.arguments, or have the run of "
        'another net begin anew, by another name=... or --resume none (in Python resume="none")'
    )
    (path / "model.params").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_parameters(path, net)
    assert one_line(error).startswith(f"{path / 'model.params'} cannot be used: ")


def test_what_is_wrong_with_a_checkpoint_is_told_by_the_letter(tmp_path, trained):
    path = trained.save(tmp_path, 3)
    sums = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**sums, "state.json": "0"}))
    damaged = "is damaged: its SHA-256 is not the one in manifest.json"
    assert problem(path) == f"{path / 'state.json'} {damaged}"
    (path / "manifest.json").write_text("{}")
    assert problem(path) == f"{path / 'manifest.json'} does not list its files"
    (path / "model.params").unlink()
    assert problem(path) == f"{path / 'model.params'} is missing"


# ---------------------------------------------------------------- complete or absent


class KilledError(BaseException):
    """Stands for kill -9: no handler of the code under test may catch it."""


def kill_at(monkeypatch, number: int) -> list:
    """Have the ``number``-th change of the file system not happen, nor anything after it."""
    made = []

    def guard(owner, name):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if len(made) == number:
                raise KilledError
            made.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    guard(Path, "rename")
    guard(Path, "mkdir")
    guard(Path, "write_text")
    guard(mx.nd, "save")
    for name in ("unlink", "rmdir", "fsync"):
        guard(os, name)
    return made


@pytest.mark.parametrize("step", [5, 4], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("leftovers", [False, True])
def test_killed_at_any_point_of_a_save_a_whole_checkpoint_is_left(
    tmp_path, monkeypatch, trained, step, leftovers
):
    number, finished = 0, False
    while not finished:
        folder = tmp_path / str(number)
        trained.save(folder, 4, keep=1)
        if leftovers:
            (folder / f".step-{step:08d}.partial").mkdir()
            (folder / f".step-{step:08d}.partial" / "model.params").write_bytes(b"half")
        with monkeypatch.context() as patch:
            made = kill_at(patch, number)
            try:
                trained.save(folder, step, keep=1)
                finished = True
            except KilledError:
                pass
        reports = []
        found = find_latest(folder, reports.append)
        assert found is not None and problem(found) is None, made
        assert checkpoint.read_state(found).step in (4, step)
        # And the next save leaves the folder as if nothing had happened.
        trained.save(folder, 6, keep=1)
        assert [path.name for path in folder.iterdir()] == ["step-00000006"], made
        number += 1
    assert number > 8


def test_synced_before_renamed(tmp_path, monkeypatch, trained):
    events = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    def rename(self, target):
        events.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    trained.save(tmp_path, 3)
    before = events[: events.index("rename")]
    assert sorted(before[:4]) == FILES and before[4] == ".step-00000003.partial"
    assert events[-1] == tmp_path.name  # the rename itself


@pytest.mark.parametrize("missing", [1, 9, 400])
def test_full_disk_is_an_error_and_no_checkpoint(tmp_path, trained, missing):
    """A file that may not grow stands for a disk that is full, be it for the last byte."""
    good = trained.save(tmp_path, 1)
    limit = max(file.stat().st_size for file in good.iterdir()) - missing
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(SaveError) as error:
            trained.save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-00000002 could not be written: " in one_line(error)
    assert list(tmp_path.iterdir()) == [good]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_a_disk_that_cannot_sync_keeps_what_it_is_given(tmp_path, trained, monkeypatch, number):
    def fails(descriptor):
        raise OSError(number, os.strerror(number))

    told = []
    monkeypatch.setattr(os, "fsync", fails)
    monkeypatch.setattr(files, "warn_once", told.append)
    if number == errno.EIO:  # the disk's own error
        with pytest.raises(SaveError, match="could not be written: Input/output error$"):
            trained.save(tmp_path, 1)
        assert list(tmp_path.iterdir()) == []
    else:
        assert problem(trained.save(tmp_path, 1)) is None
        said = (
            "the file system of the checkpoints cannot sync {} to disk ({}): a power cut may cost "
            "the newest one"
        )
        both = {said.format(kind, os.strerror(number)) for kind in ("files", "folders")}
        assert set(told) == both


def test_an_error_without_a_text_of_the_systems_is_told(tmp_path, trained, monkeypatch):
    def fails(descriptor):
        raise OSError("odd")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(SaveError) as error:
        trained.save(tmp_path, 1)
    assert one_line(error) == f"{tmp_path / 'step-00000001'} could not be written: odd"


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        *((text, "manifest.json does not list") for text in ("[]", "null", "{}", '"\\ud800"')),
        ('{"model.params": 1}', "manifest.json does not list"),
        ("[" * 3000, "cannot be read: "),
    ],
)
def test_strange_manifest_is_a_problem(two, manifest, said):
    (two[1] / "manifest.json").write_text(manifest)
    assert said in problem(two[1]) and problem(two[1]).startswith(str(two[1]))


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory, trained):
    folder = tmp_path_factory.mktemp("reference")
    trained.save(folder, 1, 0.5)
    trained.save(folder, 2, 0.6)
    return folder


@given(
    file=st.sampled_from(FILES),
    place=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
    cut=st.booleans(),
)
def test_any_byte_may_be_wrong(reference_folder, tmp_path_factory, file, place, flip, cut):
    folder = tmp_path_factory.mktemp("damaged") / "checkpoints"
    shutil.copytree(reference_folder, folder)
    old, new = listing(folder)
    content = bytearray((new / file).read_bytes())
    position = int(place * len(content))
    if cut:
        del content[position:]
    else:
        content[position] ^= flip
    (new / file).write_bytes(bytes(content))
    reports = []
    found = find_latest(folder, reports.append)
    find_best(folder)  # says what it can, raises nothing
    if found == new:  # the flip is in white space between the sums
        assert file == "manifest.json"
        assert json.loads(content) == json.loads((reference_folder / new.name / file).read_bytes())
    else:
        assert found == old and len(reports) == 1 and "\n" not in reports[0]
    other = Run(seed=4)
    restore(found, other.net, other.trainer)
    shutil.rmtree(folder)

"""Checkpoints are exact, complete or absent, and not used when damaged."""

from __future__ import annotations

import contextlib
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
    find_best,
    find_latest,
    listing,
    optimizer_state,
    problem,
    restore,
    resume,
    run_folder,
)
from trainer.config import Config, Optimizer, to_dict
from trainer.data.loader import Batch
from trainer.errors import ConfigError
from trainer.step.optimizer import make_trainer
from trainer.step.step import train_step

FILES = ["manifest.json", "model.params", "optimizer.params", "state.json"]
TOTALS = [[1.5, 2.0, 6.0], [-3.0, 4.0, 12.0]]  # a loss may be below zero
# Without the one for MXNet's own tests, and the one that takes matrices only.
OPTIMIZERS = sorted(set(mx.optimizer.Optimizer.opt_registry) - {"test", "groupadagrad"})


class Run:
    """A net with batch norm and dropout, its trainer, and steps that depend on their number."""

    def __init__(self, name="sgd", units=3, seed=0, names=(None, None), **optimizer):
        mx.random.seed(seed)
        self.net = nn.HybridSequential()
        self.net.add(
            nn.Dense(4, in_units=5, prefix=names[0]),
            nn.BatchNorm(in_channels=4),
            nn.Activation("tanh"),
            nn.Dropout(0.3),
            nn.Dense(units, in_units=4, prefix=names[1]),
        )
        self.net.initialize(mx.init.Normal(0.5))
        settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **optimizer}
        self.config = Config(optimizer=Optimizer(name, **settings))
        self.trainer = make_trainer(self.net, self.config.optimizer)

    def train(self, first: int, last: int) -> Run:
        for step in range(first, last):
            random = np.random.RandomState(step)
            data = mx.nd.array(random.normal(size=(6, 5)))
            label = mx.nd.array(random.randint(0, 3, 6))
            parts = self.config.optimizer.accumulate
            batch = Batch(data, label, 6, 6, (6 // parts,) * parts)
            mx.random.seed(step)
            self.trainer.set_learning_rate(0.05 / (1 + step))
            train_step(self.net, self.trainer, batch, self.config)
        return self

    def save(self, folder: Path, step: int, accuracy=None, keep: int = 2, **state) -> Path:
        state = {"totals": TOTALS, "accuracy": accuracy, "config": {"seed": 1}, **state}
        state["step"] = step
        content = checkpoint.snapshot(self.net, self.trainer, RunState(**state))
        path = checkpoint.write(folder, content)
        checkpoint.prune(folder, keep)
        return path

    def arrays(self) -> dict:
        """Every bit that the run consists of: parameters, running statistics, momenta."""
        mx.nd.waitall()
        parameters = self.net._collect_params_with_prefix()
        found = {name: p.data().asnumpy() for name, p in parameters.items()}
        # Not by the trainer's numbers: those depend on the layers that were made before.
        names = {id(p): name for name, p in parameters.items()}

        def flat(prefix, state):
            if isinstance(state, (list, tuple)):
                for place, item in enumerate(state):
                    flat(f"{prefix}.{place}", item)
            elif state is not None:
                found[prefix] = state.asnumpy()

        for index, state in self.trainer._updaters[0].states.items():
            flat(f"state of {names[id(self.trainer._params[index])]}", state)
        return found


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


@pytest.fixture(scope="module")
def trained():
    return Run().train(0, 3)


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize(
    "name, settings",
    [
        ("sgd", {}),
        ("sgd", {"momentum": 0.0}),
        ("sgd", {"nesterov": True}),
        ("sgd", {"clip_norm": 0.5, "accumulate": 2}),
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


def test_checkpoint_before_the_first_step(tmp_path):
    path = Run("adam").save(tmp_path, 0)
    resumed = Run("adam", seed=9)
    restore(path, resumed.net, resumed.trainer)
    assert_same(resumed.train(0, 3).arrays(), Run("adam").train(0, 3).arrays())


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


@pytest.mark.parametrize(
    ("launch", "asked", "step"),
    [
        ("ours", "auto", 9),
        ("ours", "none", 6),  # what this launch has saved before it was started again
        ("ours", "PATH", 6),
        ("new", "none", None),
        ("new", "PATH", 3),
        (None, "none", None),
        (None, "PATH", 3),
    ],
)
def test_where_a_restarted_launch_resumes(tmp_path, monkeypatch, trained, launch, asked, step):
    settings = Config(output=str(tmp_path))
    folder = settings.checkpoint_folder
    for number, made_by in ((3, None), (6, "ours"), (9, "theirs")):
        trained.save(folder, number, keep=3, launch=made_by, config=to_dict(settings))
    monkeypatch.delenv("LAUNCH_ID", raising=False)
    if launch is not None:
        monkeypatch.setenv("LAUNCH_ID", launch)
    wanted = str(folder / "step-00000003") if asked == "PATH" else asked
    found = resume.choose(settings, wanted, force=False)
    assert found == (None if step is None else folder / f"step-{step:08d}")


def test_a_second_run_of_one_process_is_not_taken_for_one_started_again(
    tmp_path, monkeypatch, trained
):
    settings = Config(output=str(tmp_path))
    monkeypatch.setenv("LAUNCH_ID", "ours")
    with run_folder.taken_folder(settings, None):
        folder = settings.checkpoint_folder
        trained.save(folder, 6, launch="ours", config=to_dict(settings))
    assert resume.choose(settings, "none", force=False) is None
    assert resume.choose(settings, "auto", force=False) == folder / "step-00000006"


# ---------------------------------------------------------------- what does not fit


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_other_optimizer_is_named(tmp_path, trained):
    path = trained.save(tmp_path, 3)
    other = Run("adam")
    with pytest.raises(CheckpointError) as error:
        restore(path, other.net, other.trainer)
    text = one_line(error)
    assert str(path) in text and "SGD" in text and "Adam" in text
    assert "another name=..., or start it anew with --resume none" in text


@pytest.mark.parametrize("place", [False, None, 3])
def test_what_is_no_path_is_not_resumed_from(tmp_path, place):
    with pytest.raises(ConfigError, match=f"resume is {place}; it must be 'auto', 'none' or the"):
        resume.choose(Config(output=str(tmp_path)), place, force=False)


def test_a_runs_folder_is_not_resumed_from_but_its_checkpoints_are_named(tmp_path, trained):
    run = Config(output=str(tmp_path), name="run")
    path = trained.save(run.checkpoint_folder, 3)
    with pytest.raises(CheckpointError) as error:
        resume.choose(Config(output=str(tmp_path), name="other"), str(run.folder), force=False)
    assert f"{run.folder} is a run's folder; give one of its checkpoints, e.g. {path}" in (
        one_line(error)
    )


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
    assert str(path) in one_line(error)


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


# ---------------------------------------------------------------- keeping


def names(folder: Path) -> list:
    return [path.name[-2:] for path in listing(folder)]


def test_newest_are_kept(tmp_path, trained):
    for step in range(1, 6):
        assert trained.save(tmp_path, step, keep=2).name == f"step-{step:08d}"
    assert names(tmp_path) == ["04", "05"]
    assert sorted(p.name for p in listing(tmp_path)[0].iterdir()) == FILES


def test_best_is_kept_besides_the_newest(tmp_path, trained):
    for step, accuracy in enumerate([0.5, 0.9, None, 0.7, None, 0.8], start=1):
        trained.save(tmp_path, step, accuracy, keep=2)
    assert names(tmp_path) == ["02", "05", "06"]
    assert find_best(tmp_path).name == "step-00000002"
    trained.save(tmp_path, 7, 0.9, keep=2)  # as good, and newer
    assert find_best(tmp_path).name == "step-00000007"
    assert names(tmp_path) == ["06", "07"]


def test_nothing_to_find(tmp_path):
    assert find_latest(tmp_path, print) is None
    assert find_latest(tmp_path / "absent", print) is None
    assert find_best(tmp_path) is None
    assert listing(tmp_path / "absent") == []


def test_steps_are_ordered_as_numbers(tmp_path, trained):
    for step in (9, 100, 1_000_000, 99_999_999):
        trained.save(tmp_path, step, keep=9)
    steps = [checkpoint.read_state(path).step for path in listing(tmp_path)]
    assert steps == [9, 100, 1_000_000, 99_999_999]


# ---------------------------------------------------------------- damage


@pytest.fixture
def two(tmp_path, trained):
    return trained.save(tmp_path, 1, 0.5), trained.save(tmp_path, 2, 0.6)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "longer", "swapped", "folder"])
def test_damaged_file_is_named_and_the_checkpoint_before_is_taken(two, file, damage):
    old, new = two
    path = new / file
    if damage in ("missing", "folder"):
        path.unlink()
        if damage == "folder":
            path.mkdir()
    else:
        content = path.read_bytes()
        other = (new / ("state.json" if file != "state.json" else "model.params")).read_bytes()
        path.write_bytes(
            {"empty": b"", "truncated": content[:-9], "longer": content + b"}", "swapped": other}[
                damage
            ]
        )
    assert str(new) in problem(new) and "\n" not in problem(new)
    reports = []
    assert find_latest(new.parent, reports.append) == old
    (report,) = reports
    assert str(new) in report and "\n" not in report
    if file != "manifest.json":
        assert file in report


def test_all_damaged(two):
    for path in two:
        (path / "model.params").write_bytes(b"")
    reports = []
    assert find_latest(two[0].parent, reports.append) is None
    assert len(reports) == 2


def test_strange_files_between_checkpoints_are_passed_over(two):
    _, new = two
    folder = new.parent
    (folder / "step-00000009").write_text("a file")
    (folder / "step-00000008").mkdir()
    (folder / "step-1x").symlink_to("nowhere")
    (folder / "notes.txt").write_text("mine")
    reports = []
    assert find_latest(folder, reports.append) == new
    assert len(reports) == 3
    assert find_best(folder) == new


@pytest.mark.parametrize(
    "state", ["[]", "null", "3", '{"accuracy": "high"}', '{"accuracy": []}', "{", ""]
)
def test_strange_state_does_not_stop_a_save(two, trained, state):
    old, _ = two
    (old / "state.json").write_text(state)
    trained.save(old.parent, 3, 0.1, keep=3)
    assert find_best(old.parent).name == "step-00000002"


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
    assert said in problem(two[1])


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


# ---------------------------------------------------------------- formats


def rewritten(path: Path, **values) -> Path:
    state = json.loads((path / checkpoint.STATE).read_text())
    (path / checkpoint.STATE).write_text(json.dumps({**state, **values}))
    return path


def test_a_later_format_is_refused_by_its_number(tmp_path, trained):
    path = rewritten(trained.save(tmp_path, 1), format=99)
    with pytest.raises(CheckpointError, match="has format 99, and this version reads formats up"):
        checkpoint.read_state(path)


@pytest.mark.parametrize("number", ["1", -1, None, 1.0, True])
def test_a_format_that_is_no_number_is_refused(tmp_path, trained, number):
    with pytest.raises(CheckpointError, match="has format"):
        checkpoint.read_state(rewritten(trained.save(tmp_path, 1), format=number))


def test_what_the_format_does_not_know_is_refused(tmp_path, trained):
    path = rewritten(trained.save(tmp_path, 1), momentum=[1.0])
    with pytest.raises(CheckpointError, match="has 'momentum', which format 1 lacks"):
        checkpoint.read_state(path)


def test_a_run_of_other_settings_has_the_next_free_number(tmp_path):
    def settings(lr: float) -> Config:
        return Config(output=str(tmp_path), name="mine", optimizer=Optimizer(lr=lr))

    for lr, name in ((0.1, "mine"), (0.2, "mine-2"), (0.3, "mine-3"), (0.2, "mine-2")):
        named = run_folder.numbered(settings(lr))
        assert named.name == name
        with run_folder.taken_folder(named, None):
            pass
    (tmp_path / "mine" / "config.yaml").write_text("seed: [")
    assert run_folder.numbered(settings(0.1)).name == "mine-4"


def test_of_two_launches_at_once_the_second_takes_the_next_number(tmp_path, capsys):
    def settings(lr: float) -> Config:
        return Config(output=str(tmp_path), name="mine", optimizer=Optimizer(lr=lr))

    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        run_folder.take(settings(0.1), None, settings(0.1), first)
        named = run_folder.take(settings(0.2), None, settings(0.2), second)
        assert named.name == "mine-2"
        assert "(optimizer.lr: 0.1 -> 0.2); this run is " in capsys.readouterr().err
        with pytest.raises(ConfigError, match="another run is using"):
            run_folder.take(settings(0.1), None, settings(0.1), second)
        with pytest.raises(ConfigError, match="another run is using"):
            run_folder.take(settings(0.3), None, None, second)

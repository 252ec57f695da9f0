"""Any input either works or ends in one clear line, and overwrites nothing.

Damage is drawn: bytes flipped, files cut, values swapped, also where the sums of a checkpoint are
made right again afterwards, so that its content is all that can tell.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import mxnet as mx
import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mxnet.gluon import nn

from launch import __main__ as launch_entry
from launch import job_script, local
from launch.blame import lacks_cause
from launch.job import Outcome
from trainer import __main__ as entry
from trainer import checkpoint, fashion_mnist, launched, params_file, resume, saved
from trainer.config import Config, ConfigError, Optimizer, as_yaml, load, to_dict
from trainer.monitor import Monitor
from trainer.optim import make_trainer
from trainer.saver import Saver
from trainer.shared_memory import SharedMemorySum

JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 9),
        st.sampled_from([10**400, -1, 2**63, float("nan"), float("inf"), 1e308, "", "x", "5"]),
        st.text(max_size=5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def damage(draw):
    """A function that damages bytes: flips, overwrites numbers, cuts, adds; mostly near an end."""
    kind = draw(st.sampled_from(["flip", "number", "cut", "add"]))
    share = draw(st.one_of(st.floats(0, 0.2), st.floats(0, 1), st.floats(0.8, 1)))
    number = draw(st.sampled_from([-1, 0, 1, 2, 3, 8, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1]))
    flip = draw(st.integers(1, 255))

    def apply(content: bytes) -> bytes:
        place = min(int(share * len(content)), max(len(content) - 1, 0))
        if kind == "cut":
            return content[:place]
        if kind == "add":
            return content[:place] + bytes([flip]) * 3 + content[place:]
        if kind == "flip":
            return content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :]
        place -= place % 4  # where the numbers of MXNet's files stand
        return content[:place] + struct.pack("<q", number) + content[place + 8 :]

    return apply


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and len(text.splitlines()) == 1, text
    return text


# ---------------------------------------------------------------- checkpoints


STATE = {"totals": [[1.0, 2.0, 3.0]] * 2, "accuracy": 0.5, "config": to_dict(Config())}
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
        state = {**STATE, "step": step}
        statistics = mx.nd.ones((2, 8)).asnumpy()
        content = checkpoint.snapshot(made.net, made.trainer, state, statistics)
        checkpoint.write(made.folder, content, keep=2)
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


def test_statistics_of_another_net_are_refused_with_the_way_out(run, tmp_path):
    """Such as those of a run with frozen weights, which once were among them."""
    content = checkpoint.snapshot(run.net, run.trainer, {**STATE, "step": 1}, np.zeros((2, 99)))
    path = checkpoint.write(tmp_path, content, keep=1)
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
            saved.load(str(where))
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


# ---------------------------------------------------------------- data


def idx(kind: int, *shape: int) -> bytes:
    size = 1
    for length in shape:
        size *= length
    return struct.pack(f">HBB{len(shape)}I", 0, 8, kind, *shape) + bytes(i % 7 for i in range(size))


@settings(max_examples=150)
@given(of_images=st.booleans(), packed=st.booleans(), inside=st.booleans(), spoil=damage())
def test_damaged_images_and_labels(tmp_path_factory, of_images, packed, inside, spoil):
    folder = tmp_path_factory.mktemp("idx")
    contents = [idx(3, 4, 5, 6), idx(1, 4)]
    for place, name in enumerate(fashion_mnist.FILES["train"]):
        content, damaged = contents[place], of_images == (place == 0)
        if damaged and (inside or not packed):
            content = spoil(content)
        if packed:
            content = gzip.compress(content, mtime=0)
            content = spoil(content) if damaged and not inside else content
        (folder / (f"{name}.gz" if packed else name)).write_bytes(content)
    try:
        images, labels = fashion_mnist.load("train", str(folder), "idx")
    except fashion_mnist.DataError as error:
        assert str(folder) in one_line(error)
    else:
        assert images.ndim == 3 and labels.shape == (len(images),) and images.size > 0


# ---------------------------------------------------------------- configs and command lines


@settings(max_examples=100)
@given(st.one_of(st.binary(max_size=40), damage().map(lambda f: f(as_yaml(Config()).encode()))))
def test_any_bytes_of_a_config_file(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(load(str(path)), Config)
    except ConfigError as error:
        one_line(error)


WORDS = [
    "train",
    "evaluate",
    "calibrate",
    "config",
    "predict",
    "export",
    "--resume",
    "--force",
    "--samples",
    "--out",
    "-h",
    "--",
    "0",
    "-1",
    "auto",
    "none",
    "seed=1",
    "device=gpu",
    "optimizer.name=sdg",
    "model.factory=a:b",
    "configs/quickstart.yaml",
]


# No system passes a NUL on to a program.
ARGUMENT = st.text(st.characters(blacklist_characters="\0"), max_size=8)


class EndError(Exception):
    """In place of the end of the process."""


@settings(max_examples=80)
@given(
    command=st.sampled_from(["train", "evaluate", "calibrate", "predict", "export", "config"]),
    rest=st.lists(st.one_of(ARGUMENT, st.sampled_from(WORDS)), max_size=4),
)
@example("train", ['output="\\0"'])
@example("train", ["output=/proc/nowhere"])
def test_any_command_line(tmp_path_factory, monkeypatch, capsys, command, rest):
    """Without data a run cannot start, so that each ends before it has written anything."""

    def leave(code: int) -> None:
        raise EndError(code)

    folder = tmp_path_factory.mktemp("empty")
    nowhere = ["data.dataset=idx", "data.folder=nowhere"]
    capsys.readouterr()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(entry, "_exit", leave)
    monkeypatch.setattr(
        "sys.argv", ["trainer", command, *rest, *nowhere[: 2 * (command == "train")]]
    )
    try:
        entry.run()
    except EndError as end:
        assert end.args == (entry.USER_ERROR,)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.endswith("\n")
        assert len(error.splitlines()) == 1 and len(error) > 10
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"HOROVOD_SIZE": "2"}, "HOROVOD_SIZE=2 in the environment"),
        ({"HOROVOD_RANK": "1"}, "HOROVOD_RANK=1 in the environment"),
        ({"HOROVOD_SIZE": "2", "HOROVOD_RANK": "1"}, "`unset HOROVOD_SIZE HOROVOD_RANK`"),
        ({"HOROVOD_SIZE": "two"}, "HOROVOD_SIZE is 'two'; it must be a whole number"),
        ({"HOROVOD_RANK": ""}, "`unset HOROVOD_RANK`"),
    ],
)
def test_variables_that_no_launcher_set_are_reported_whatever_rank_they_name(
    monkeypatch, capsys, variables, words
):
    def leave(code: int) -> None:
        raise EndError(code)

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(entry, "_exit", leave)
    monkeypatch.setattr("sys.argv", ["trainer", "export", "nowhere", "--output", "nowhere"])
    with pytest.raises(EndError, match=str(entry.USER_ERROR)):
        entry.run()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in one_line(error.rstrip("\n"))


@pytest.mark.parametrize(
    "variables",
    [
        {"HOROVOD_SIZE": "1", "HOROVOD_RANK": "0"},
        {"HOROVOD_SIZE": "2", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1"},
        {"HOROVOD_SIZE": "2", "PMI_SIZE": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    ],
)
def test_what_launchers_set_is_left_alone(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launched.check()


@pytest.fixture
def said_of(monkeypatch, capsys):
    """What a rank says, and that it exits with 1, when training raises an error."""
    monkeypatch.setattr(SharedMemorySum, "lost", None)  # other tests have lost some

    def run(error: Exception, rank: int) -> str:
        def leave(code: int) -> None:
            raise EndError(code)

        def train(**options: object) -> None:
            raise error

        monkeypatch.setenv("HOROVOD_RANK", str(rank))
        monkeypatch.setattr(entry, "_exit", leave)
        monkeypatch.setattr(entry.commands_run.train, "callback", train)
        monkeypatch.setattr("sys.argv", ["trainer", "train"])
        with pytest.raises(EndError) as end:
            entry.run()
        assert end.value.args == (1,)
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("rank", [0, 1])
def test_an_unexpected_error_is_reported_with_its_traceback_on_any_rank(said_of, rank):
    """Such as a ValueError from NumPy, or from the user's own net, in the middle of a run."""
    error = said_of(ValueError("operands could not be broadcast together"), rank)
    assert "Traceback" in error and "test_bad_input.py" in error
    assert f"rank {rank} on" in error and "operands could not" in error


@pytest.mark.parametrize("words", entry._LOST_PEER)
def test_a_rank_that_lost_another_says_so_in_words_that_the_launcher_knows(said_of, words):
    """Or it would be named for the cause: see launch/blame.py."""
    error = said_of(RuntimeError(f"...: {words}"), 1)
    assert len(error.splitlines()) == 1 and "rank 1 on" in error
    assert lacks_cause(True, error.splitlines()) and lacks_cause(True, [words])


def test_an_operator_that_has_lost_a_rank_says_so_though_its_error_does_not(said_of, monkeypatch):
    monkeypatch.setattr(SharedMemorySum, "lost", "process 0 of 2 on this node has been stopped")
    error = said_of(RuntimeError("Check failed in custom.cc"), 1)
    assert len(error.splitlines()) == 1 and "rank 1 on" in error
    assert lacks_cause(True, error.splitlines()) and lacks_cause(True, [SharedMemorySum.lost])


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
    start = resume.checkpoint_folder(settings_) / "step-00000001"
    with pytest.raises(ConfigError) as error, resume.usable(settings_.folder):
        resume.take_folder(settings_, start)
        Monitor(settings_.folder / "events", 0, enabled=True)
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
    resume.take_folder(settings_, None).release()
    folder, told = resume.checkpoint_folder(settings_), []
    saver = Saver(folder, 1, told.append)
    content = checkpoint.snapshot(run.net, run.trainer, {**STATE, "step": 1})
    saver.begin(content)
    assert saver.wait() is None
    disk.mount("remount", "ro")
    saver.begin(content._replace(state={**content.state, "step": 2}))
    failure = saver.wait()
    assert failure and "Read-only file system" in failure and told == [f"{failure}; " + KEPT]
    assert checkpoint.find_latest(folder, pytest.fail).name == "step-00000001"
    with pytest.raises(ConfigError, match="Read-only file system"), resume.usable(folder):
        resume.take_folder(settings_, folder / "step-00000001")


def test_folders_on_other_devices(run, disk, tmp_path):
    """Checkpoints may lie on another disk; a run's folder that is one cannot be set aside."""
    (tmp_path / "runs" / "linked").mkdir(parents=True)
    (tmp_path / "runs" / "linked" / "checkpoints").symlink_to(disk.folder)
    settings_ = Config(output=str(tmp_path / "runs"), name="linked")
    start = resume.checkpoint_folder(settings_) / "step-00000001"
    resume.take_folder(settings_, start).release()
    content = checkpoint.snapshot(run.net, run.trainer, {**STATE, "step": 1})
    path = checkpoint.write(resume.checkpoint_folder(settings_), content, keep=1)
    assert checkpoint.problem(path) is None and (disk.folder / path.name).is_dir()
    mounted = Config(output=str(tmp_path), name="disk")
    with pytest.raises(ConfigError) as error, resume.usable(mounted.folder):
        resume.take_folder(mounted, None)
    assert "busy" in one_line(error.value) and (disk.folder / path.name).is_dir()


def test_strange_event_files_are_left_alone(tmp_path):
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"\xff" * 99)
    monitor = Monitor(tmp_path, 5, enabled=True)
    monitor.scalars({"train/loss": 1.0}, 6)
    monitor.close()
    assert (tmp_path / "events.out.tfevents.1.host").read_bytes() == b"\xff" * 99
    assert len(list(tmp_path.iterdir())) == 2


# ---------------------------------------------------------------- a site's file

FIELDS = sorted(job_script.JobOptions.__dataclass_fields__)


@settings(max_examples=150)
@given(st.dictionaries(st.one_of(st.sampled_from(FIELDS), st.text(max_size=4)), JSON, max_size=3))
@example({"time": 30})
@example({"nodes": True})
@example({"ranks_per_node": [1]})
def test_any_site_file(tmp_path, site):
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(site), errors="replace")
    try:
        options = job_script.job_options(job_script.read_site(path), {})
        script = job_script.render(options, ["true"], tmp_path, "python", ["launch"])
    except ValueError as error:
        one_line(error)
    else:
        assert script.startswith("#!/bin/bash\n")


@settings(max_examples=50)
@given(st.binary(max_size=30))
def test_any_bytes_of_a_site_file(tmp_path, content):
    path = tmp_path / "site.yaml"
    path.write_bytes(content)
    try:
        job_script.read_site(path)
    except ValueError as error:
        one_line(error)


# ---------------------------------------------------------------- launch's command line

OPTIONS = {
    "local": "-n --kill-after --start-timeout --min-ranks --max-ranks --max-restarts "
    "--discover-every",
    "slurm": "--nodes --gpus-per-node --ranks-per-node --cpus-per-rank --time --partition "
    "--account --qos --name --log --container --container-runtime --save-seconds --max-requeues "
    "--site",
    "slurm-rank": "--start-timeout",
    "slurm-job": "--save-seconds --max-requeues",
    "elastic-rank": "-n",
    "doctor": "-n",
}
VALUES = [
    "0",
    "1",
    "2",
    "-1",
    "1e9",
    "nan",
    "inf",
    "9" * 30,
    "",
    "x",
    "a\nb",
    "\0",
    "--",
    "1:00:00",
]


@st.composite
def launch_command_lines(draw):
    action = draw(st.sampled_from(sorted(OPTIONS)))
    value = st.one_of(st.sampled_from(VALUES), st.text(max_size=4))
    pairs = st.tuples(st.sampled_from(OPTIONS[action].split()), value)
    words = [word for pair in draw(st.lists(pairs, min_size=1, max_size=3)) for word in pair]
    return [action, *["--dry-run"] * (action == "slurm"), *words, "--", "true"]


@settings(max_examples=150)
@given(launch_command_lines())
@example(["local", "-n", "9" * 30, "--", "true"])
@example(["local", "-n", "1", "--start-timeout", "inf", "--", "true"])
@example(["slurm", "--dry-run", "--name", "a\nrm -rf b", "--", "true"])
def test_any_command_line_of_launch(tmp_path_factory, monkeypatch, capsys, arguments):
    """Nothing is started: what is given is judged before."""
    folder = tmp_path_factory.mktemp("empty")
    capsys.readouterr()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(local, "_run_once", lambda *_: Outcome(0))
    try:
        code = launch_entry.main(arguments)
    except SystemExit as end:  # argparse: its usage, and one line
        code = end.code
    shown, said = capsys.readouterr()
    if code == 0:
        head = shown.split("\n\n")[0].splitlines()
        assert arguments[0] == "local" or all(line.startswith("#") for line in head)
    else:
        assert code == 2
        usage, _, line = said.partition("error: ")
        assert usage.startswith("usage: ") or len(said.splitlines()) == 1
        assert len(line or said) > 10
    assert list(folder.iterdir()) == []

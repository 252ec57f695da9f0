"""`python -m trainer`, alone and under horovodrun: its files, how it resumes, how it fails."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Iterator, List

import mxnet as mx
import numpy as np
import pytest

from trainer import checkpoint, config
from trainer.data import fashion_mnist

from . import nets
from .commands import ROOT, SMALL, Done, curves, read_until, run, run_and_signal, start, trainer


def _weights(folder: Path) -> dict:
    path = checkpoint.find_latest(folder / "checkpoints", print)
    assert path is not None
    return {name: a.asnumpy() for name, a in mx.nd.load(str(path / checkpoint.PARAMETERS)).items()}


def _rank_pids(launcher: int, ranks: int) -> List[int]:
    """The ranks below a horovodrun, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if b"trainer\0train" in command and f"TEST_LAUNCHER={launcher}".encode() in variables:
            rank = next((v for v in variables if v.startswith(b"HOROVOD_RANK=")), None)
            if rank is not None:
                found[int(rank.split(b"=")[1])] = int(entry.name)
    assert len(found) == ranks, found
    return [found[rank] for rank in range(ranks)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run of two epochs on two ranks, never disturbed."""
    output = tmp_path_factory.mktemp("runs")
    done = run(trainer("train", *SMALL, "train.epochs=2", f"output={output}", ranks=2))
    assert done.code == 0, done.out + done.err
    for expected in ("2000 training and 500 test images", "epoch 2:", "(500 images)", "done:"):
        assert expected in done.out
    assert f"tensorboard --logdir {output}" in done.out
    assert str(output / "default" / "checkpoints" / "step-00000032") in done.out
    assert "higher accuracy" not in done.out, "of a sample"
    assert re.search(r"\] 1/32 epoch 1/2  loss \d", done.out), "the first step"
    began = [line for line in done.out.splitlines() if "starting: " in line]
    assert len(began) == 3 and "waiting for 2 ranks, reading fashion_mnist_sample" in began[1]
    assert "[1]<stdout>" not in done.out + done.err, "rank 1 is quiet"
    yield output / "default"


def test_a_run_leaves_checkpoint_config_and_events(straight: Path) -> None:
    path = checkpoint.find_latest(straight / "checkpoints", print)
    assert path is not None and path.name == "step-00000032"
    net = nets.small()
    net.load_parameters(str(path / "model.params"))
    assert net(mx.nd.zeros((1, 1, 28, 28))).shape == (1, 10)
    assert json.loads((path / "state.json").read_text())["step"] == 32
    assert (straight / "config.yaml").is_file()
    assert len(list((straight / "events").glob("events.out.tfevents.*"))) == 1


@pytest.mark.parametrize(("norm", "stops"), [("local", 1), ("sync", 2)])
def test_a_run_stopped_by_a_signal_resumes_to_the_same_bits(
    straight: Path, tmp_path: Path, norm: str, stops: int
) -> None:
    """SIGTERM in mid-epoch; then the end. Dropout and augmentation included."""
    settings = [*SMALL, "train.epochs=2", f"batch_norm={norm}"]
    if norm == "local":
        straight = tmp_path / "straight"
        done = run(trainer("train", *settings, f"output={tmp_path}", "name=straight", ranks=2))
        assert done.code == 0, done.err
    command = trainer("train", *settings, f"output={tmp_path}", ranks=2)
    for _ in range(stops):
        # With a save after each step there is time for the signal before the last one.
        slowly = [*command, "checkpoint.every_steps=1"]
        process = start(["env", f"TEST_LAUNCHER={os.getpid()}", *slowly])
        try:
            read_until(process, "accuracy")
            os.kill(_rank_pids(os.getpid(), 2)[1], signal.SIGTERM)
            process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode != 0
    path = checkpoint.find_latest(tmp_path / "default" / "checkpoints", print)
    assert path is not None and 0 < checkpoint.read_state(path).step < 32
    done = run(command)
    assert done.code == 0 and "resumes from" in done.out, done.out + done.err
    expected = _weights(straight)
    for name, array in _weights(tmp_path / "default").items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert curves(tmp_path / "default") == curves(straight)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_is_the_same_on_1_2_and_4_ranks(tmp_path: Path, accumulate: int) -> None:
    """Thirty steps with augmentation and warm-up, to rounding; the net has no kinks."""
    settings = ["model.factory=tests.integration.nets:smooth", "schedule.warmup_epochs=1"]
    settings += ["train.epochs=2", "train.max_steps=30", "monitor.every_steps=1"]
    settings += [f"optimizer.accumulate={accumulate}"]
    losses = {}
    for ranks in (1, 2, 4):
        places = [f"output={tmp_path}", f"name={ranks}"]
        done = run(trainer("train", *SMALL, *settings, *places, ranks=ranks))
        assert done.code == 0, done.out + done.err
        losses[ranks] = np.array([loss for _, loss in curves(tmp_path / str(ranks))["loss/train"]])
        assert len(losses[ranks]) == 30
        np.testing.assert_allclose(losses[ranks], losses[1], rtol=5e-5)


def test_alone_a_stopped_run_exits_85(tmp_path: Path) -> None:
    command = trainer("train", *SMALL, "train.epochs=50", f"output={tmp_path}")
    done = run_and_signal(command, "test loss", signal.SIGUSR1)
    assert done.code == 85
    assert "as asked; saved" in done.out
    # Not the best one, that of the end of an epoch.
    newest = checkpoint.find_latest(tmp_path / "default" / "checkpoints", print)
    assert re.findall(r"^checkpoint: +(.*)$", done.out, re.M) == [str(newest)]


def test_interrupted_it_saves_and_leaves_without_a_traceback(tmp_path: Path) -> None:
    command = trainer("train", *SMALL, "train.epochs=50", f"output={tmp_path}")
    done = run_and_signal(command, "images/s", signal.SIGINT)
    assert done.code == 130
    assert "Traceback" not in done.out and "as asked; saved" in done.out
    last = done.out.strip().splitlines()[-1]
    assert last.startswith("resume: ") and " -m trainer train model.factory=" in last, last


@pytest.mark.parametrize(
    ("number", "seconds", "words"),
    [(signal.SIGKILL, 30, "another rank has ended"), (signal.SIGSTOP, 60, "rank 0")],
)
def test_a_lost_rank_ends_the_job(tmp_path: Path, number: int, seconds: float, words: str) -> None:
    """Killed: the peers notice at once. Stopped: after Gloo's time-out, or by the watchdog."""
    settings = ["train.epochs=1000", "train.watchdog_seconds=10", f"output={tmp_path}"]
    command = trainer("train", *SMALL, *settings, ranks=2)
    process = start(["env", f"TEST_LAUNCHER={os.getpid()}", *command])
    stopped = None
    try:
        read_until(process, "images/s")
        stopped = _rank_pids(os.getpid(), 2)[1]
        os.kill(stopped, number)
        assert "rank 0 on" in read_until(process, words, seconds)
        if number == signal.SIGSTOP:
            os.kill(stopped, signal.SIGKILL)  # horovodrun waits for it otherwise
        process.communicate(timeout=60)
    finally:
        process.kill()
        if stopped is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stopped, signal.SIGKILL)
    assert process.returncode != 0


def test_a_loss_that_is_not_finite_stops_all_ranks_at_its_step(tmp_path: Path) -> None:
    settings = ["optimizer.lr=1e38", "train.epochs=1", f"output={tmp_path}"]
    done = run(trainer("train", *SMALL, *settings, ranks=2))
    assert done.code != 0
    assert "the loss was not finite at step" in done.err
    assert "nothing was saved before" in done.err
    assert "<stderr>:Traceback" not in done.err
    assert not list(tmp_path.glob("default/checkpoints/*"))


def test_an_error_on_one_rank_is_reported_by_rank_0(tmp_path: Path) -> None:
    """Each rank reads a folder named after it; rank 1's is empty."""
    full = fashion_mnist.SAMPLE_FOLDER
    command = trainer(
        "train", *SMALL, "data.dataset=idx", "data.folder=data", f"output={tmp_path}/runs", ranks=2
    )
    for rank in (0, 1):
        (tmp_path / f"{rank}").mkdir()
    (tmp_path / "0" / "data").symlink_to(full)
    (tmp_path / "1" / "data").mkdir()
    root = Path(__file__).parents[2]
    script = f'cd {tmp_path}/$HOROVOD_RANK && PYTHONPATH={root} exec "$@"'
    inner = command[command.index("-np") + 2 :]
    done = run([*command[:3], "sh", "-c", script, "sh", *inner])
    assert "[0]<stderr>:error: rank 1 on" in done.err, done.out + done.err
    assert done.code != 0 and not (tmp_path / "runs").exists()


def test_two_runs_in_one_folder_are_kept_apart(tmp_path: Path) -> None:
    """As where somebody types `srun -n 2 python -m trainer` and gets two runs of one rank."""
    command = trainer("train", *SMALL, "train.epochs=1000", f"output={tmp_path}")
    first = start(command)
    try:
        read_until(first, "images/s")
        second = run(command)
        assert second.code == 2
        assert "another run is using" in second.err
        assert len(second.err.splitlines()) == 1
    finally:
        first.kill()
        first.wait()
    assert len(list(tmp_path.glob("default*"))) == 1


def test_a_saved_model_is_evaluated_and_calibrated_on_ranks(straight: Path) -> None:
    done = run(trainer("evaluate", str(straight), "--trust", ranks=2))
    said = re.search(r"accuracy (0\.\d+)", done.out)
    path = checkpoint.find_best(straight / "checkpoints")
    assert said and path, done.err
    assert float(said[1]) == round(checkpoint.read_state(path).accuracy, 4)
    done = run(trainer("calibrate", str(straight), "--trust", "--samples", "500", ranks=2))
    assert done.code == 0 and "wrote" in done.out, done.err
    nets.small().load_parameters(str(straight / "calibrated.params"))


def test_other_settings_than_the_checkpoint_are_refused(straight: Path) -> None:
    before = sorted(straight.rglob("*"))
    arguments = [*SMALL, "train.epochs=2", "optimizer.lr=0.06", f"output={straight.parent}"]
    arguments += ["name=default"]
    done = run(trainer("train", *arguments, ranks=2))
    assert "optimizer.lr: 0.05 -> 0.06" in done.err
    assert done.code != 0 and sorted(straight.rglob("*")) == before


def test_a_run_of_other_settings_has_a_name_of_its_own(tmp_path: Path) -> None:
    """On two ranks, of which the second cannot see the runs: rank 0 decides for both."""
    command = trainer("train", *SMALL, "train.max_steps=2", f"output={tmp_path}/${{OF}}", ranks=2)
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    script = 'OF=$HOROVOD_RANK exec "$@"'

    def trained(*settings: str) -> Done:
        done = run([*command[:3], "sh", "-c", script, "sh", *command[3:], *settings])
        assert done.code == 0, done.err
        return done

    trained()
    second = trained("optimizer.lr=0.06")
    told = "default was made with other settings (optimizer.lr: 0.05 -> 0.06); this run is "
    assert told in second.err and f"{tmp_path}/0/default-2: 2000 training" in second.out
    third = trained("optimizer.lr=0.07")
    assert f"{tmp_path}/0/default-3: " in third.out and not list((tmp_path / "1").iterdir())
    again = trained("optimizer.lr=0.06", "train.max_steps=3")
    assert "resumes from" in again.out and "default-2/checkpoints/step-00000002" in again.out
    anew = trained("optimizer.lr=0.06", "--resume", "none")
    assert "default-2.1 now" in anew.err and "default-2: 2000 training" in anew.out
    assert sorted(p.name for p in (tmp_path / "0").iterdir() if p.name[0] != ".") == [
        *("default", "default-2", "default-2.1", "default-3")
    ]


def test_launches_at_once_of_other_settings_have_names_of_their_own(tmp_path: Path) -> None:
    settings = ["train.max_steps=2", f"output={tmp_path}"]
    runs = [
        start(trainer("train", *SMALL, *settings, f"optimizer.lr={lr}")) for lr in (0.1, 0.2, 0.3)
    ]
    for process in runs:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
    assert sorted(path.name for path in tmp_path.glob("default*")) == [
        *("default", "default-2", "default-3")
    ]


@pytest.mark.parametrize("command", ["train", "bench"])
def test_help_lists_all_settings_by_group_with_their_defaults(command: str) -> None:
    done = run(["env", "COLUMNS=100", *trainer(command, "--help")])
    assert done.code == 0
    for line in ("Settings: optimizer:", "optimizer.lr=0.1 ", "train.epochs=10 ", "seed=0 "):
        assert f"  {line}" in done.out or f"\n{line}" in done.out, line
    for name in config.all_settings():
        assert f"  {name}=" in done.out


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--epochs", "3"], "train.epochs=3"),
        (["--lr=0.1"], "optimizer.lr=0.1"),
        (["-lr", "0.1"], "optimizer.lr=0.1"),
        (["--batch-size", "64"], "train.global_batch_size=64"),
        (["--data-folder", "/x"], "data.folder=/x"),
        (["--name", "seed=1"], "name=..."),
    ],
)
def test_an_option_that_is_a_setting_is_told_how_to_type_it(option: List[str], told: str) -> None:
    for command in (["train", "quickstart"], ["bench"], ["evaluate", "x"]):
        done = run(trainer(*command, *option))
        assert done.code == 2 and len(done.err.splitlines()) == 1, done.err
        assert done.err.startswith(f"error: there is no option {option[0].split('=')[0]}; ")
        assert told in done.err


def test_errors_and_helps_of_both_programs_look_alike() -> None:
    for module, wrong in (("trainer", ["summary", "--deep"]), ("launch", ["local", "--deep"])):
        done = run([sys.executable, "-m", module, *wrong])
        assert done.code == 2 and done.err.startswith("error: "), done.err
        assert len(done.err.splitlines()) == 1
        said = run([sys.executable, "-m", module, "--help"]).out
        assert said.startswith(f"Usage: python -m {module} ") and "\nOptions:\n" in said


def test_a_run_is_found_by_its_name(straight: Path, tmp_path: Path) -> None:
    """In the folder of runs below the current one; what there is at a path goes first."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "good").symlink_to(straight)
    where = ["env", "-C", str(tmp_path), f"PYTHONPATH={ROOT}"]
    done = run([*where, *trainer("evaluate", "good", "--trust")])
    assert done.code == 0 and done.out.startswith("runs/good/checkpoints/step-"), done.err
    done = run([*where, *trainer("compare", "good", str(straight))])
    assert done.code == 0, done.err
    done = run([*where, *trainer("predict", "godo", "x.png")])
    assert done.code == 2 and "there is no folder godo; did you mean good?" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["configs/quikstart.yaml"], "did you mean configs/quickstart.yaml?"),
        (["configs/nosuch.yaml"], "book.yaml, configs/fashion_mnist.yaml"),
        (["nowhere/nosuch.yaml"], "; presets: book, fashion_mnist"),
        (["optimizer.learning_rate=1"], "unknown setting optimizer.learning_rate"),
        (["optimizer.lr", "=", "0.1"], "override 'optimizer.lr' must read setting=value"),
        (["model.factory=tests.integration.nets:smal"], "has no such function"),
        (["model.factory=tests.integration.nets:not_a_net"], "not a Gluon Block"),
        (["optimizer.name=sdg"], "sgd"),
        (["data.folder=/nonexistent"], "/nonexistent"),
        (["device=gpu"], "device is gpu; MXNet sees none"),
        (["--resume", "/nonexistent"], "cannot resume"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, arguments: List[str], words: str
) -> None:
    done = run(trainer("train", *arguments, f"output={tmp_path}/runs"))
    assert done.code == 2
    assert len(done.err.splitlines()) == 1 and done.err.startswith("error: "), done.err
    assert words in done.err and "site-example" not in done.err
    assert not (tmp_path / "runs").exists()


def test_ranks_that_do_not_find_each_other_refuse_to_train(tmp_path: Path) -> None:
    """As under mpirun, where Horovod is built without MPI: each would be a run of its own."""
    alone = ["env", "OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_RANK=0"]
    done = run([*alone, *trainer("train", *SMALL, f"output={tmp_path}/runs")])
    assert done.code == 2
    assert len(done.err.splitlines()) == 1 and not (tmp_path / "runs").exists()
    assert "2 processes were started, but Horovod joins only 1" in done.err
    assert "`python -m launch local -n 2 --`" in done.err


def test_variables_that_no_launcher_set_are_named_at_once(tmp_path: Path) -> None:
    """Left in a shell, say: Gloo would wait half a minute for the other rank."""
    command = trainer("train", *SMALL, f"output={tmp_path}/runs")
    done = run(["env", "HOROVOD_SIZE=2", *command])
    assert done.code == 2 and len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("error: HOROVOD_SIZE=2 in the environment, without ")
    assert "`unset HOROVOD_SIZE`" in done.err and not (tmp_path / "runs").exists()


def test_ranks_train_where_dev_shm_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    settings = [*SMALL, "train.max_steps=2", f"output={tmp_path}"]
    read_only = 'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"'
    ranks = [sys.executable, "-m", "launch", "local", "-n", "2", "--quiet", "--"]
    train = trainer("train", *settings)
    done = run(["unshare", "--mount", "bash", "-c", read_only, "bash", *ranks, *train])
    assert done.code == 0 and "(500 images)" in done.out, done.out + done.err


@pytest.mark.parametrize(
    "model",
    [
        ["model.factory=tests.integration.nets:imperative"],
        ["model.factory=d2lzh:resnet18", "model.arguments={num_classes: 10}", "data.image_size=14"],
    ],
)
def test_nets_of_other_makers(tmp_path: Path, model: List[str]) -> None:
    settings = [*SMALL, *model, "train.max_steps=2", "train.global_batch_size=16"]
    done = run(trainer("train", *settings, f"output={tmp_path}", ranks=2))
    assert done.code == 0 and "(500 images)" in done.out, done.out + done.err


def test_summary_prints_the_seeds_shapes() -> None:
    done = run(trainer("summary", "data.image_size=224"))
    for shape in ("(1, 64, 112, 112)", "(1, 64, 56, 56)", "(1, 512, 7, 7)", "(1, 10)"):
        assert shape in done.out
    assert "11,178,378" in done.out

"""`launch.run`: a Python function on ranks, from a script or a notebook."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, List

import mxnet as mx
import numpy as np
import psutil
import pytest

import launch
from launch.core.ranks import cores_per_rank
from launch.local.function import RankError
from tests.documents import ROOT, blocks
from tests.transformed import Transform
from trainer.config import Data
from trainer.data import fashion_mnist

from . import nets
from .commands import SMALL


def test_results_come_by_rank_and_lines_name_theirs(
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    added = 10

    def work(factor: int, offset: int = 0) -> tuple:
        import horovod.mxnet as hvd
        import mxnet as mx

        hvd.init()
        print(f"I am {hvd.rank()}")
        total = hvd.allreduce(mx.nd.array([hvd.rank() + added]), average=False, name="total")
        return factor * hvd.rank() + offset, total, int(os.environ["OMP_NUM_THREADS"])

    results = launch.run(work, (100,), {"offset": 5}, ranks=np.int64(2))
    assert [number for number, _, _ in results] == [5, 105]
    assert [total.asscalar() for _, total, _ in results] == [21, 21]
    assert {threads for _, _, threads in results} == {cores_per_rank(2)}
    said = capfd.readouterr().out
    assert "[0] I am 0\n" in said and "[1] I am 1\n" in said


def test_a_net_comes_back_trained_with_synced_norm_and_compiled(tmp_path: Path) -> None:
    def train(net: Any, settings: List[str]) -> Any:
        from trainer import config
        from trainer.run.loop import fit

        result = fit(net, config.load(None, settings))
        return net, result.evaluation.accuracy

    settings = [*SMALL[1:], f"output={tmp_path}", "train.epochs=1", "train.max_steps=3"]
    (net, accuracy), (_, other) = launch.run(train, (nets.small(), settings), ranks=2)
    assert accuracy == other
    images, labels = fashion_mnist.load("test", None, "fashion_mnist_sample")
    prepared = Transform(images, Data(), seed=0, training=False)(np.arange(len(images)))
    answers = net(mx.nd.array(prepared)).argmax(axis=1).asnumpy()
    assert (answers == labels).mean() == pytest.approx(accuracy)


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_first_lines_of_python_on_the_readme_run_as_they_are(page: str, tmp_path: Path) -> None:
    """But for the size of the run."""
    lines = next(block.text for block in blocks(ROOT / page) if block.language == "python")
    smaller = [*SMALL[1:], "batch_norm=sync", f"output={tmp_path}", "train.max_steps=1"]
    shown = 'Config(name="mine", batch_norm="sync")'
    assert shown in lines
    run = f"__import__('trainer').config.load(None, {smaller})"
    script = tmp_path / "script.py"
    script.write_text(lines.replace(shown, run), encoding="utf-8")
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 0, said.stderr
    *_, last = said.stdout.splitlines()
    first, second = ast.literal_eval(last)
    assert 0 <= first == second <= 1


def _fail_on(rank: int) -> None:
    if int(os.environ["HOROVOD_RANK"]) == rank:
        print("about to fail")
        raise KeyError("a missing shelf")
    time.sleep(60)


def _killed_on(rank: int) -> None:
    if int(os.environ["HOROVOD_RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _lock() -> object:
    return threading.Lock()


def _exit_quietly() -> None:
    os._exit(0)


@pytest.mark.parametrize(
    ("function", "args", "words"),
    [
        (_fail_on, (1,), ["rank 1 ended with exit code 1", "KeyError: 'a missing shelf'"]),
        (_killed_on, (0,), ["rank 0 was killed by SIGKILL"]),
        (_lock, (), ["what it returned cannot be sent on: cannot pickle '_thread.lock' object"]),
        (_exit_quietly, (), ["ranks 0, 1 ended before the function returned"]),
    ],
)
def test_the_rank_that_failed_is_named_with_its_last_lines(
    function: object, args: tuple, words: List[str]
) -> None:
    with pytest.raises(RankError) as caught:
        launch.run(function, args, ranks=2)
    for word in words:
        assert word in str(caught.value)


def test_wrong_use_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    for ranks in (0, -1, 2.0, True, np.bool_(True)):
        with pytest.raises(ValueError, match="whole number from 1"):
            launch.run(_lock, ranks=ranks)
    with pytest.raises(ValueError, match=r"_fail_on cannot be sent .* pickle '_thread.lock'"):
        launch.run(_fail_on, (threading.Lock(),))
    with pytest.raises(ValueError, match="train.* is no function"):
        launch.run("train()")
    with pytest.raises(ValueError, match="_fail_on cannot be sent .* dictionary"):
        launch.run(_fail_on, (1,), [1])
    for args in (nets.small(), "text", 5):
        with pytest.raises(ValueError, match=r"args is a \w+; .* a tuple, e\.g\. \(net,\)"):
            launch.run(_fail_on, args)
    monkeypatch.setenv("HOROVOD_RANK", "3")
    with pytest.raises(ValueError, match="rank 3 of a job already"):
        launch.run(_lock)


SCRIPT = """
    import signal, time
    import launch

    def work():
        print("at work", flush=True)
        time.sleep(100)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        launch.run(work, ranks=2)
    except KeyboardInterrupt:
        after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        print("interrupted; handlers kept:", before == after)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed_it_leaves_no_rank_behind(number: int) -> None:
    script = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        said = [script.stdout.readline() for _ in range(2)]
        assert sorted(said) == ["[0] at work\n", "[1] at work\n"]
        below = psutil.Process(script.pid).children(recursive=True)
        assert len(below) == 4, "a supervisor, its watcher and two ranks"
        script.send_signal(number)
        rest, _ = script.communicate(timeout=60)
    finally:
        script.kill()
    assert number == signal.SIGKILL or "interrupted; handlers kept: True" in rest
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not alive


SAVES = """
    import sys
    import launch

    def work(folder):
        import os, signal, time

        def save(*_):
            time.sleep(0.5)
            open(os.path.join(folder, os.environ["HOROVOD_RANK"]), "w").close()
            os._exit(0)

        signal.signal(signal.SIGTERM, save)
        print("at work", flush=True)
        time.sleep(100)

    launch.run(work, (sys.argv[1],), ranks=2)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_ranks_save_when_the_script_that_called_it_is_ended(number: int, tmp_path: Path) -> None:
    heard = ["env", "--default-signal=HUP"]  # also where the tests run under nohup
    command = [*heard, sys.executable, "-c", textwrap.dedent(SAVES), str(tmp_path)]
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # where nothing is to be left
    script = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    try:
        said = [script.stdout.readline() for _ in range(2)]
        assert sorted(said) == ["[0] at work\n", "[1] at work\n"]
        script.send_signal(number)
        script.communicate(timeout=60)
    finally:
        script.kill()
    assert script.returncode == -number
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]

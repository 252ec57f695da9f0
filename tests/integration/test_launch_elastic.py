"""`python -m launch local` and elastic horovodrun continue after ranks were lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Dict

import mxnet as mx
import numpy as np
import psutil
import pytest

from trainer import checkpoint

from .commands import HOROVODRUN, SMALL, read_until, run, start, trainer

STANDIN = Path(__file__).with_name("standin.py")
LAUNCH = [sys.executable, "-m", "launch", "local", "--kill-after", "2"]
NET = "model.factory=tests.integration.nets:steady"
TRAIN = trainer("train", *SMALL, NET, "train.epochs=3", "checkpoint.every_steps=3")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed")
    done = run([*TRAIN, f"output={output}"])
    assert done.code == 0, done.err
    return output


@pytest.fixture(scope="module")
def undisturbed(earlier: Path) -> Dict[str, np.ndarray]:
    """Its weights."""
    return _weights(earlier)


def _weights(output: Path) -> Dict[str, np.ndarray]:
    path = checkpoint.find_latest(output / "default" / "checkpoints", print)
    assert path is not None and path.name == "step-00000048"
    return {name: a.asnumpy() for name, a in mx.nd.load(str(path / checkpoint.PARAMETERS)).items()}


def _assert_same(found: Dict[str, np.ndarray], expected: Dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4, err_msg=name)


def _rank(launcher: subprocess.Popen, rank: int) -> psutil.Process:
    """The process that is that rank: the last that carries its number."""
    found = []
    for child in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if child.environ().get("HOROVOD_RANK") == str(rank):
                found.append(child)
    return found[-1]


def test_losing_rank_0_and_another_does_not_change_the_result(
    tmp_path: Path, earlier: Path, undisturbed: Dict[str, np.ndarray]
) -> None:
    """Three ranks, then two, then one; anew at first, and from what was saved since after that."""
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    train = [*TRAIN, "--resume", "none", f"output={tmp_path}"]
    job = [*LAUNCH, "-n", "3", "--min-ranks", "1", "--", *train]
    process = start(["env", "STEP_SECONDS=0.1", *job])
    try:
        for lost in (0, 1):
            read_until(process, "images/s")
            _rank(process, lost).kill()
            said = read_until(process, "launch: rank")
            assert f"rank {lost} was killed by SIGKILL" in said
            assert f"continuing with {2 - lost} rank" in said
        said = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "resumes from" in said
    _assert_same(_weights(tmp_path), undisturbed)
    assert [path.name for path in sorted(tmp_path.glob("default*"))] == ["default", "default.1"]


def test_elastic_horovodrun_takes_in_a_host_and_loses_rank_0(
    tmp_path: Path, undisturbed: Dict[str, np.ndarray]
) -> None:
    """Horovod gives up a whole host with a rank: three names of this machine are three hosts."""
    hosts, script = tmp_path / "hosts", tmp_path / "discover.sh"
    hosts.write_text("localhost:1\n127.0.0.1:1\n")
    script.write_text(f"#!/bin/sh\ncat {hosts}\n")
    script.chmod(0o755)
    elastic = ["-np", "2", "--min-np", "1", "--max-np", "3", "--network-interfaces", "lo"]
    elastic += ["--host-discovery-script", str(script)]
    job = [HOROVODRUN, *elastic, *TRAIN, f"output={tmp_path}", "train.watchdog_seconds=60"]
    process = start(["env", "STEP_SECONDS=0.2", *job])
    try:
        read_until(process, "images/s")
        hosts.write_text(hosts.read_text() + f"{socket.gethostname()}:1\n")
        read_until(process, "3 ranks on")
        read_until(process, "images/s")
        _rank(process, 0).kill()
        read_until(process, "rank 0 was killed by SIGKILL")
        read_until(process, "2 ranks on")
        said = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 0, said
    _assert_same(_weights(tmp_path), undisturbed)


def test_ranks_are_added_and_taken_where_all_have_saved(tmp_path: Path) -> None:
    slots, losses = tmp_path / "slots", tmp_path / "losses"
    slots.write_text("1")
    elastic = ["--min-ranks", "1", "--max-ranks", "3"]
    elastic += ["--discover", f"cat {slots}", "--discover-every", "0.5"]
    command = ["python", str(STANDIN), str(tmp_path), "60", "0.1"]
    process = start([*LAUNCH, *elastic, "--", *command])
    try:
        for ranks, room in ((1, "3"), (3, "2")):
            read_until(process, f"with {ranks} ranks")
            slots.write_text(room)
        said = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "the number of slots has changed; continuing with 2 ranks\n" in said
    steps = [int(line.split()[0]) for line in losses.read_text().splitlines()]
    assert steps == list(range(60)), "each step once"


def _failing(code: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*LAUNCH, "-n", "2", *options, "--", "python", "-c", f"import os, sys, time; {code}"],
        cwd=STANDIN.parents[2],
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_too_few_ranks_left_end_the_job() -> None:
    code = "os.environ['HOROVOD_RANK'] == '1' and os.kill(os.getpid(), 9); time.sleep(60)"
    done = _failing(code, "--min-ranks", "2")
    assert done.returncode == 128 + signal.SIGKILL
    said = done.stderr.splitlines()
    assert said[0] == "launch: not started again: slots left: 1, --min-ranks is 2"
    assert said[-1].startswith("launch: rank 1 was killed by SIGKILL")


@pytest.mark.parametrize(("code", "starts"), [(1, 3), (85, 3), (2, 1), (0, 1)])
def test_number_of_starts_of_a_command_that_always_ends_alike(
    tmp_path: Path, code: int, starts: int
) -> None:
    script = f"open(r'{tmp_path}/starts', 'a').write('x'); sys.exit({code})"
    done = _failing(script, "--max-restarts", "2", "-n", "1")
    assert (done.returncode, (tmp_path / "starts").read_text()) == (code, "x" * starts)

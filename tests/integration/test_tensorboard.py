"""The event files in the real TensorBoard, asked over HTTP."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Iterator

import pytest

from .commands import SMALL, read_until, run, start, trainer

SCALARS = {
    "train/loss",
    "train/accuracy",
    "train/lr",
    "train/gradient_norm",
    "speed/images_per_second",
    "epoch/loss",
    "epoch/accuracy",
    "test/loss",
    "test/accuracy",
}


class TensorBoard:
    """A running TensorBoard."""

    def __init__(self, address: str):
        self._address = address

    def get(self, path: str, **query: str) -> Any:
        """What it answers, from JSON."""
        url = f"{self._address}/data/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.loads(answer.read())

    def scalars(self, tag: str) -> list:
        """[wall time, step, value] of each point."""
        return self.get("plugin/scalars/scalars", run="default/events", tag=tag)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TensorBoard]:
    """A run of two ranks, stopped in mid-epoch and gone on with, in TensorBoard."""
    output = tmp_path_factory.mktemp("runs")
    command = trainer("train", *SMALL, "train.epochs=3", f"output={output}")
    process = start(command)
    try:
        read_until(process, "8/48")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 85
    done = run(command)
    assert done.code == 0 and "goes on from" in done.out, done.err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--logdir", str(output), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *arguments, "--load_fast=false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        board = TensorBoard(f"http://127.0.0.1:{port}")
        _wait_for_points(board, server)
        yield board
    finally:
        server.terminate()
        server.wait(20)


def _wait_for_points(board: TensorBoard, server: subprocess.Popen) -> None:
    until = time.monotonic() + 90
    while time.monotonic() < until:
        assert server.poll() is None, "TensorBoard has ended"
        try:
            tags = board.get("plugin/scalars/tags").get("default/events", {})
            if set(tags) >= SCALARS and board.scalars("test/loss")[-1][1] == 48:
                return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.5)
    raise AssertionError("TensorBoard shows no points after 90 s")


def test_scalars_have_each_step_once_although_the_run_was_stopped(board: TensorBoard) -> None:
    for tag in ("train/loss", "train/lr", "train/gradient_norm"):
        steps = [step for _, step, _ in board.scalars(tag)]
        assert steps == list(range(4, 49, 4)), tag
    assert [step for _, step, _ in board.scalars("test/accuracy")] == [16, 32, 48]


def test_pictures_and_texts_are_there(board: TensorBoard) -> None:
    images = board.get("plugin/images/tags")["default/events"]
    assert {"test/confusion", "test/predictions"} <= set(images)
    texts = board.get("plugin/text/tags")["default/events"]
    assert any("config" in text for text in texts) and any("model" in text for text in texts)


def test_the_final_figures_are_beside_the_settings(board: TensorBoard) -> None:
    runs = board.get("plugin/scalars/tags")
    found = [tags for tags in runs.values() if "final/accuracy" in tags]
    assert len(found) == 1


def test_rank_0_alone_writes(board: TensorBoard, tmp_path: Path) -> None:
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

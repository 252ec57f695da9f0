"""Runs that several test modules use, trained once."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from .board import TensorBoard, tensorboard
from .commands import SMALL, Done, run, run_and_signal, trainer


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> None:
    """Let the commands hear ctrl-C although pytest itself runs in a shell's background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class PastRuns(NamedTuple):
    """Two runs in one folder."""

    folder: Path  # with ``default``, of one rank, stopped in mid-epoch and gone on with
    two: Done  # what ``two``, of two ranks with a batch norm of their own, said in JSON


@pytest.fixture(scope="session")
def past_runs(tmp_path_factory: pytest.TempPathFactory) -> PastRuns:
    """They are only to be looked at."""
    output = tmp_path_factory.mktemp("runs")
    command = trainer("train", *SMALL, "train.epochs=3", f"output={output}")
    # With a save after each step there is time for the signal before the last one.
    slowly = [*command, "checkpoint.every_steps=1"]
    assert run_and_signal(slowly, "8/48", signal.SIGTERM).code == 85
    done = run(command)
    assert done.code == 0 and "resumes from" in done.out, done.err
    settings = ["train.epochs=2", "batch_norm=local", "name=two", f"output={output}"]
    two = run(
        [
            *(sys.executable, "-m", "launch", "local", "-n", "2", "--quiet", "--"),
            *trainer("train", *SMALL, *settings, "--log-format", "json"),
        ]
    )
    assert two.code == 0, two.err
    return PastRuns(output, two)


@pytest.fixture(scope="session")
def board(past_runs: PastRuns) -> Iterator[TensorBoard]:
    """TensorBoard on both, when it has read them."""

    def has_read_all(board: TensorBoard) -> bool:
        ends = {"default/events": 48, "two/events": 32}
        tags = board.get("plugin/scalars/tags")
        return all(
            "loss/test" in tags.get(run, {}) and board.scalars(run, "loss/test")[-1][1] == end
            for run, end in ends.items()
        )

    with tensorboard(past_runs.folder, has_read_all) as served:
        yield served

"""Runs the real command lines."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]
HOROVODRUN = str(Path(sys.executable).with_name("horovodrun"))

# A net of a thousand weights, on the 2,000 + 500 images of the sample: a step takes milliseconds.
SMALL = [
    "model.factory=tests.integration.nets:small",
    "data.dataset=fashion_mnist_sample",
    "data.pad_crop=2",
    "data.flip=true",
    "train.global_batch_size=125",
    "optimizer.lr=0.05",
    "batch_norm=sync",
    "monitor.every_steps=4",
    "train.watchdog_seconds=120",
]


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def trainer(*arguments: str, ranks: int = 1) -> List[str]:
    """``python -m trainer ARGUMENTS``, under horovodrun where there are several ranks."""
    command = [sys.executable, "-m", "trainer", *arguments]
    return command if ranks == 1 else [HOROVODRUN, "-np", str(ranks), *command]


def environment() -> dict:
    """This process's environment, with one thread per rank and a short timeout for hung ranks."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HOROVOD_GLOO_TIMEOUT_SECONDS": "20"}


def run(command: Sequence[str], seconds: float = 240) -> Done:
    """Run ``command`` from the project's folder to its end."""

    def once() -> Done:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=seconds
        )
        return Done(done.returncode, done.stdout, done.stderr)

    done = once()
    # On a busy machine ranks of horovodrun may connect to a peer before it listens: see
    # tests/parallel/conftest.py. They end in hvd.init(), before any file is made.
    refused = "gloo::IoException" in done.err and "Connection refused" in done.err
    if Path(command[0]).name == "horovodrun" and done.code and refused:
        done = once()
    return done


def start(command: Sequence[str]) -> subprocess.Popen:
    """Start ``command`` in the project's folder, with both streams in one line-buffered pipe."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment(), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    )


def read_until(process: subprocess.Popen, text: str, seconds: float = 120) -> str:
    """The output of ``process`` up to the line with ``text``; kills it if that does not come."""
    lines = []
    limit = threading.Timer(seconds, process.kill)
    limit.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if text in line:
                return "".join(lines)
    finally:
        limit.cancel()
    raise AssertionError(f"{text!r} never came:\n{''.join(lines)}")


def curves(folder: Path) -> Dict[str, List[Tuple[int, float]]]:
    """(step, value) of every point of a run by tag, read by TensorBoard, without system metrics."""
    events = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(("speed/", "system/"))]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def run_and_signal(command: Sequence[str], text: str, number: int) -> Done:
    """Run ``command`` until it prints ``text``, send it a signal, and wait for it to end."""
    process = start(command)
    try:
        read_until(process, text)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return Done(process.returncode, out, "")

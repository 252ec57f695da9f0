"""`make train` in a real terminal, and what it says to type next, typed there."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Iterator

import pytest

from trainer.data import fashion_mnist

from .commands import ROOT

pytestmark = [
    pytest.mark.skipif(
        Path(sys.executable).parent != ROOT / ".venv" / "bin", reason="make uses .venv, not this"
    ),
    pytest.mark.skipif(
        not fashion_mnist.DEBIAN_FOLDER.is_dir(), reason="apt-get install dataset-fashion-mnist"
    ),
]

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r")
CONTROL_C = "\x03"


class Terminal:
    """An interactive shell, of a user who has activated nothing, in the project's folder."""

    def __init__(self) -> None:
        self._master, screen = os.openpty()
        fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
        own = str(Path(sys.executable).parent)
        path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != own)
        kept = {name: os.environ[name] for name in ("HOME", "CI", "CXX") if name in os.environ}
        self._shell = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "-i"],
            cwd=ROOT,
            env={**kept, "PATH": path, "TERM": "xterm", "OMP_NUM_THREADS": "1", "PS1": "ready> "},
            stdin=screen,
            stdout=screen,
            stderr=screen,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(screen)
        self._seen = ""
        self.wait_for("ready> ")

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 300) -> str:
        """What was shown up to what fits ``pattern``, since the last such call."""
        until = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self._seen)
            if found:
                shown, self._seen = self._seen[: found.end()], self._seen[found.end() :]
                return shown
            left = until - time.monotonic()
            assert left > 0, f"{pattern} never came:\n{self._seen}"
            if select.select([self._master], [], [], left)[0]:
                self._seen += _ESCAPES.sub("", os.read(self._master, 65536).decode())

    def close(self) -> None:
        """End the shell and what runs in it."""
        os.killpg(self._shell.pid, signal.SIGHUP)
        os.close(self._master)
        self._shell.wait(timeout=60)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    yield opened
    opened.close()


def test_every_command_that_make_train_prints_works_when_pasted(
    terminal: Terminal, tmp_path: Path
) -> None:
    runs = tmp_path / "my runs"
    place = f"'output={runs}'"
    small = "model.factory=tests.integration.nets:small train.max_steps=2"
    terminal.type(f'make train ARGS="{place} {small}"\n')
    shown = terminal.wait_for(r"\ndone: .*\n(.+: .*\n)+ready> ")
    assert "starting: waiting for 2 ranks" in shown and "2/2" in shown
    rows = dict(re.findall(r"^([a-z ]+): +(.*\S)$", shown[shown.index("\ndone: ") :], re.MULTILINE))
    assert all(Path(rows.pop(name)).is_dir() for name in ("checkpoint", "events"))
    assert list(rows)[1:] == ["view", "list runs", "higher accuracy"], rows

    terminal.type(f"{rows['list runs']}\n")
    assert "quickstart" in terminal.wait_for(r"done +2/2.*\n(.*\n)*ready> ")
    terminal.type(f"{rows['view']} --port 0\n")
    terminal.wait_for(r"TensorBoard \S+ at http://")
    terminal.type(CONTROL_C)
    terminal.wait_for("ready> ")
    assert rows["higher accuracy"].startswith("make train CONFIG=configs/fashion_mnist.yaml ")
    terminal.type(f"{rows['higher accuracy']}\n")
    terminal.wait_for(r" [1-9]\d*/7035 ")
    terminal.type(CONTROL_C)
    stopped = terminal.wait_for(r"ready> ")
    assert "as asked; saved" in stopped and "error" not in stopped and "Traceback" not in stopped
    again = re.search(r"^resume: +(.*\S)$", stopped, re.MULTILINE)
    assert again, stopped
    terminal.type(f"{again[1]}\n")
    terminal.wait_for(r"resumes from .*fashion_mnist/checkpoints/step-0")
    terminal.wait_for(r" [1-9]\d*/7035 ")
    terminal.type(CONTROL_C)
    terminal.wait_for("ready> ")

"""Tests end, and leave no rank behind, however they go: tests/conftest.py, pytest-timeout."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Tuple

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
RANK = (  # for str.format
    "import os, subprocess, time\n"
    "def test_it(tmp_path):\n"
    "    command = ['sleep', '600']\n"
    "    process = subprocess.Popen(command, env=dict(os.environ, HOROVOD_RANK='0'))\n"
    "    open({pid!r}, 'w').write(str(process.pid))\n"
)


def run(folder: Path, end: str, *options: str) -> Tuple[str, bool]:
    """What pytest says of a test that starts a rank and ends so; whether the rank still runs."""
    pid = folder / "pid"
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "test_it.py").write_text(RANK.format(pid=str(pid)) + f"    {end}\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(folder)]
    unmarked = {name: value for name, value in os.environ.items() if name != "TESTS_OF"}
    done = subprocess.run(command, env=unmarked, stdout=subprocess.PIPE, text=True, timeout=300)
    with contextlib.suppress(psutil.NoSuchProcess):
        rank = psutil.Process(int(pid.read_text()))
        # Killed by a parent that ended at once, it may still wait for whoever inherits it.
        return done.stdout, rank.status() != psutil.STATUS_ZOMBIE
    return done.stdout, False


def test_a_test_that_fails_leaves_no_rank_behind(tmp_path: Path) -> None:
    said, left = run(tmp_path, "assert False")
    assert "1 failed" in said and "error" not in said.splitlines()[-1] and not left, said


def test_one_that_passes_and_leaves_a_rank_behind_makes_the_session_fail(tmp_path: Path) -> None:
    said, left = run(tmp_path, "pass")
    assert "tests have left ranks or launchers running" in said and "1 error" in said, said
    assert not left


def test_one_that_hangs_is_ended(tmp_path: Path) -> None:
    said, left = run(tmp_path, "time.sleep(600)", "--timeout=3")
    assert "Timeout" in said and "1 failed" in said and not left, said


def test_every_test_has_a_limit(pytestconfig: pytest.Config) -> None:
    assert 300 <= float(pytestconfig.getini("timeout")) <= 900

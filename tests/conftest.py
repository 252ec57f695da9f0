"""What all tests need: a user's environment, and an end to every rank that they start.

From the environment is taken what a developer's shell has and a new user's has not, so that the
commands which tests start behave as they do for users: with PYTHONUNBUFFERED set, say, a stdout
that cannot be written does not change a program's exit code.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from typing import Iterator, List

import psutil
import pytest

PREFIXES = ("PYTHON", "LC_", "MPL")
NAMES = ("LANG", "LANGUAGE", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "PAGER")

for name in list(os.environ):
    if name.startswith(PREFIXES) or name in NAMES:
        del os.environ[name]

MARK = "TESTS_OF"  # in the environment of every process that tests start: of which pytest
INSIDE = "HOROVOD_RANK" in os.environ  # this pytest runs in a rank itself, see parallel/
if not INSIDE:
    os.environ[MARK] = secrets.token_hex(8)


def ranks_since(began: float) -> List[psutil.Process]:
    """The ranks, and what launches some, that tests have started since and that still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            given, words = process.environ(), " ".join(process.cmdline())
            own = given.get(MARK) == os.environ[MARK] and process.pid != os.getpid()
            of_a_job = "HOROVOD_RANK" in given or "horovodrun" in words or "launch" in words
            if own and of_a_job and process.create_time() >= began:
                found.append(process)
    return found


BEGAN = pytest.StashKey[float]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[BEGAN] = time.time() - 1.0  # create_time is coarse


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    """A test that fails leaves no rank behind."""
    if call.excinfo is not None and not INSIDE:
        for process in ranks_since(item.stash[BEGAN]):
            with contextlib.suppress(psutil.Error):
                process.kill()


@pytest.fixture(scope="session", autouse=True)
def _no_rank_is_left() -> Iterator[None]:
    """Nor does one that passes, or the session fails."""
    yield
    _, left = psutil.wait_procs([] if INSIDE else ranks_since(0.0), timeout=10)
    said = [f"{process.pid}: {' '.join(process.cmdline())}" for process in left]
    for process in left:
        process.kill()
    assert not left, f"tests have left ranks or launchers running: {said}"

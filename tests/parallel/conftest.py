"""Tests that run inside a rank: each module here is started under horovodrun, on 2 and 3 ranks.

A module may set ``RANKS = (2, 3, 4)``, and a costly test of it ``@pytest.mark.ranks(3)`` to run on
fewer of them. With ``HOSTS = ((1, 1), (2, 2))`` it also runs on two hosts with a rank each and on
two with two each (tests/integration/hosts.py), but for tests marked ``@pytest.mark.one_node``. To
look at one by hand: ``horovodrun -np 2 python -m pytest tests/parallel/test_dist.py``.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator, List, Optional, Tuple

import pytest

from tests.integration.hosts import Hosts, start_ranks, why_not

DEFAULT_RANKS = (2, 3)
SECONDS = 900  # for one module on one number of ranks
INSIDE = "HOROVOD_RANK" in os.environ
PYTEST = (sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HOROVOD_GLOO_TIMEOUT_SECONDS": "20",
    "HOROVOD_CYCLE_TIME": "3",  # milliseconds: of hundreds of small sums each takes a cycle or two
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks(*numbers): the numbers of ranks that a test runs on")
    config.addinivalue_line("markers", "one_node: of ranks that share memory; not run over hosts")


@pytest.hookimpl(tryfirst=True)
def pytest_collect_file(file_path: Path, parent: Any) -> Optional[pytest.Collector]:
    """Outside of a rank a module is one test for each number of ranks."""
    if INSIDE or not file_path.name.startswith("test_"):
        return None
    return LaunchedModule.from_parent(parent, path=file_path)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> Optional[pytest.Collector]:
    """Outside of a rank the module itself is not collected."""
    return None if INSIDE else Nothing.from_parent(parent, path=module_path)


class Nothing(pytest.File):
    """In place of a module that runs elsewhere."""

    def collect(self) -> Iterator[pytest.Item]:
        return iter(())


class LaunchedModule(pytest.File):
    """A module, once for each number of ranks."""

    def collect(self) -> Iterator[pytest.Item]:
        for ranks in _setting(self.path, "RANKS", DEFAULT_RANKS):
            yield LaunchedTests.from_parent(self, name=f"{ranks}_ranks", ranks=ranks)
        for hosts in _setting(self.path, "HOSTS", ()):
            name = f"hosts_with_{'_'.join(map(str, hosts))}"
            yield TestsOverHosts.from_parent(self, name=name, hosts=hosts)


class LaunchedTests(pytest.Item):
    """The tests of a module under horovodrun."""

    def __init__(self, ranks: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.ranks = ranks
        self.add_marker(pytest.mark.timeout(SECONDS + 60))

    def runtest(self) -> None:
        code, said = self._launched()
        # On a busy machine ranks of horovodrun may connect to a peer before it listens; they end
        # in hvd.init(), before any test. (launch makes such a start again by itself.)
        if (
            code
            and "Connection refused" in said
            and not re.search(r"^\[\d+\]<stdout>:[.F]", said, re.M)
        ):
            code, said = self._launched()
        if code:
            raise LaunchError(said)
        # pytest exits with 5 where it finds no test, so a module that shrinks to nothing fails.

    def _launched(self) -> Tuple[int, str]:
        horovodrun = str(Path(sys.executable).with_name("horovodrun"))
        done = subprocess.run(
            [horovodrun, "-np", str(self.ranks), *PYTEST, str(self.path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            env={**os.environ, **ENVIRONMENT},
            cwd=str(self.config.rootpath),
        )
        return done.returncode, done.stdout

    def repr_failure(self, excinfo: Any, style: Any = None) -> str:
        if isinstance(excinfo.value, LaunchError):
            lines = str(excinfo.value).splitlines()
            first = [line for line in lines if "Error" in line or "assert" in line][:40]
            return "\n".join(["what failed:", *first, "", "the end:", *lines[-60:]])
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> Tuple[Path, None, str]:
        return self.path, None, f"{self.path.name} on {self.ranks} ranks"


class TestsOverHosts(LaunchedTests):
    """The tests of a module on hosts, each with a number of ranks."""

    __test__ = False  # by its name pytest takes it for tests of this module

    def __init__(self, hosts: Tuple[int, ...], **kwargs: Any):
        super().__init__(ranks=sum(hosts), **kwargs)
        self._hosts = hosts

    def runtest(self) -> None:
        reason = why_not()
        if reason is not None:
            pytest.skip(reason)
        command = [*PYTEST, "-m", "not one_node", str(self.path)]
        count = sum(self._hosts)
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            pool = stack.enter_context(ThreadPoolExecutor(count))
            hosts = stack.enter_context(Hosts(len(self._hosts), Path(folder)))
            ranks = start_ranks(hosts, self._hosts, command, ENVIRONMENT)
            waiting = [pool.submit(rank.communicate, timeout=SECONDS) for rank in ranks]
            outputs = [done.result()[0] for done in waiting]
        if any(rank.returncode for rank in ranks):
            raise LaunchError("\n".join(outputs))

    def reportinfo(self) -> Tuple[Path, None, str]:
        return self.path, None, f"{self.path.name} on hosts with {self._hosts} ranks"


class LaunchError(Exception):
    """The output of ranks that failed."""


def _setting(path: Path, name: str, default: Tuple[Any, ...]) -> Tuple[Any, ...]:
    """``RANKS`` or ``HOSTS`` as the module sets it, read without importing it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return tuple(ast.literal_eval(node.value))
    return default


if INSIDE:

    def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
        """Deselect tests that are marked for other numbers of ranks."""
        marks = [item.get_closest_marker("ranks") for item in items]
        ranks = int(os.environ["HOROVOD_SIZE"])
        others = [item for item, mark in zip(items, marks) if mark and ranks not in mark.args]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]

    @pytest.fixture(scope="session", autouse=True)
    def _joined(request: pytest.FixtureRequest) -> Iterator[None]:
        from trainer import dist

        dist.init()
        yield
        if not request.session.testsfailed:
            dist.shutdown()

    def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
        """A rank whose test failed leaves at once: its peers wait in a collective for it."""
        if exitstatus:
            session.config.pluginmanager.getplugin("terminalreporter").summary_failures()
            sys.stdout.flush()
            os._exit(exitstatus)

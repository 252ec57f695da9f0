"""Which mutants of the modules that most depends on are killed by the unit tests of their room.

    nice -n 19 python -m benchmarks.mutants

Mutants are mutmut's: each is the module with one operator, constant, condition or text changed. It
is killed if a test fails. Survivors are printed and written to results/mutants.json; the table in
docs/reliability.md is made anew. A mutant takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import difflib
import importlib.abc
import importlib.util
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

# Loaded once, for all mutants; nothing of the project's own, which each loads anew.
import hypothesis
import mxnet  # noqa: F401
import pytest
from mutmut import Context, list_mutations, mutate

from benchmarks import report

# A failure is enough: to look for a smaller one takes most of the time.
_PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile(
    "mutants",
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    phases=_PHASES,
    suppress_health_check=list(hypothesis.HealthCheck),
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
RECORD = report.RESULTS / "mutants.json"
CPU_SECONDS = 120  # of its tests; a mutant that takes more is killed too
TESTS = {
    "trainer/data/sharding.py": "data/test_sharding.py",
    "trainer/step/schedule.py": "step/test_optimizer.py",
    "launch/slurm/requeue.py": "launch/slurm/test_requeue.py",
    "launch/core/ranks.py": "launch/core/test_ranks.py",
    "trainer/checkpoint/state.py": "checkpoint/test_state.py",
    "trainer/checkpoint/files.py": "checkpoint/test_files.py checkpoint/test_bad_checkpoints.py",
    "trainer/checkpoint/run_folder.py": "checkpoint/test_run_folder.py checkpoint/test_resume.py",
    "trainer/step/step.py": "step/test_step.py",
}


class _Mutant(importlib.abc.InspectLoader, importlib.abc.MetaPathFinder):
    """Has a module imported from another source."""

    def __init__(self, module: str, source: str):
        self._name, self._source = module[: -len(".py")].replace("/", "."), source

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self._name else None

    def get_source(self, fullname: str) -> str:
        return self._source


def mutants(source: str) -> List[str]:
    """The sources that differ from ``source`` by one mutation."""
    places = list_mutations(Context(source=source))
    return [mutate(Context(source=source, mutation_id=place))[0] for place in places]


def started(module: str, source: str, tests: List[str]) -> int:
    """A process in which the module has another source; it exits with 0 if all tests pass."""
    child = os.fork()
    if child:
        return child
    with contextlib.suppress(BaseException):
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        sys.meta_path.insert(0, _Mutant(module, source))
        quietly = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
        os._exit(int(pytest.main([*quietly, *tests])))
    os._exit(1)


def surviving(module: str, sources: List[str], tests: List[str]) -> Iterator[str]:
    """Those of a module's ``sources`` with which all tests pass; as many at a time as cores."""
    running: Dict[int, str] = {}
    waiting = sources[::-1]
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            source = waiting.pop()
            running[started(module, source, tests)] = source
        child, status = os.wait()
        ended = running.pop(child)
        if status == 0:
            yield ended


def changed(source: str, mutant: str) -> Tuple[str, str]:
    """The first line that differs, and what it has become."""
    lines = list(difflib.ndiff(source.splitlines(), mutant.splitlines()))
    before, after = ([line[2:].strip() for line in lines if line[:2] == s] for s in ("- ", "+ "))
    return before[0], (after or ["(left out)"])[0]


def measure(module: str, tests: List[str], first: Optional[int]) -> Dict[str, Any]:
    """Try the ``first`` mutants of a module, or all. Exits if its tests fail without any."""
    source = (ROOT / module).read_text()
    if not list(surviving(module, [source], tests)):
        sys.exit(f"{' '.join(tests)} fail as it is")
    made, began, left = mutants(source)[:first], time.monotonic(), []
    for mutant in surviving(module, made, tests):
        left.append(changed(source, mutant))
        print(f"{module} survives: {' -> '.join(left[-1])}", flush=True)
    print(f"{module}: {len(made) - len(left)} of {len(made)} killed", flush=True)
    return {
        "mutants": len(made),
        "killed": len(made) - len(left),
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.monotonic() - began),
        "tests": tests,
        "survivors": left,
    }


def show(figures: Dict[str, Dict[str, Any]]) -> str:
    """The table of the page."""
    rows = [
        (
            f"`{name}`",
            of["mutants"],
            of["killed"],
            f"{100 * of['killed'] / of['mutants']:.0f} %",
            ", ".join(f"`{Path(test).name}`" for test in of["tests"]),
        )
        for name, of in figures.items()
    ]
    return report.table(("module", "mutants", "killed", "score", "by"), rows)


def main() -> None:
    """Measure the modules, write results/mutants.json and the table in docs/reliability.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="default: " + ", ".join(TESTS))
    parser.add_argument("--first", type=int, help="mutants of each module, instead of all")
    args = parser.parse_args()
    unknown = set(args.modules) - set(TESTS)
    if unknown:
        parser.error(f"no tests are known for {', '.join(sorted(unknown))}")
    os.chdir(ROOT)
    before = report.machine()
    figures: Dict[str, Any] = {}
    if RECORD.exists():  # of the modules that are not named
        figures = {k: v for k, v in json.loads(RECORD.read_text())["figures"].items() if k in TESTS}
    for module in args.modules or TESTS:
        tests = [f"tests/unit/{name}" for name in TESTS[module].split()]
        figures[module] = measure(module, tests, args.first)
        report.write("mutants", figures, before)
        report.include(PAGE, "benchmarks.mutants", show(figures))


if __name__ == "__main__":
    main()

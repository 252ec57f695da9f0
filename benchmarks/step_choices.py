"""Ablation: the speed of a run compared to runs that differ in a single setting.

    python -m benchmarks.step_choices [--only "tcmalloc,jemalloc"] [--rounds 5] [--steps 40]

28 x 28, 64 images per rank, 2 ranks, the project's own loop with real data. Every measurement is a
new job. Each round measures the unchanged run and then every choice, so that other load on the
machine affects all. A ratio is the median over rounds, each relative to the unchanged run of its
round. Choices not selected keep their results in ``results/step_choices.json``; the table over all
goes into ``docs/performance.md``. A round takes 15 seconds per choice and for the unchanged run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence

from benchmarks import report, speed

NAME = "step_choices"
AS_IS = "as it is"
TCMALLOC, JEMALLOC = "libtcmalloc_minimal.so.4", "libjemalloc.so.2"


class Choice(NamedTuple):
    """How a run differs from the unchanged one."""

    settings: Sequence[str] = ()
    environment: Mapping[str, str] = MappingProxyType({})

    def contender(self, steps: int) -> Any:
        """The project's loop on 2 ranks with this choice, for :func:`speed.alternate`."""
        options = ["--size=28", f"--steps={steps}", "--settings", *speed.SILENT, *self.settings]
        return speed.peer("this_project", speed.OWN_LAUNCHER, *options, **self.environment)


def run(*settings: str, **environment: str) -> Choice:
    """A run with some settings and environment variables."""
    return Choice(settings, environment)


HOROVOD = "optimizer.shared_memory=false"
CHOICES: Dict[str, Choice] = {
    "ranks not kept to cores (`OMP_PROC_BIND=false`)": run(OMP_PROC_BIND="false"),
    f"gradients through Horovod (`{HOROVOD}`)": run(HOROVOD),
    "through Horovod, in one bucket (`optimizer.bucket_mb=100`)": run(
        HOROVOD, "optimizer.bucket_mb=100"
    ),
    "products in bfloat16 (`train.precision=bfloat16`)": run("train.precision=bfloat16"),
    "`HOROVOD_CYCLE_TIME=1` instead of 100": run(HOROVOD_CYCLE_TIME="1"),
    "`HOROVOD_CYCLE_TIME=200`": run(HOROVOD_CYCLE_TIME="200"),
    "`HOROVOD_CYCLE_TIME=1000`": run(HOROVOD_CYCLE_TIME="1000"),
    "bulks of 100 operators (`MXNET_EXEC_BULK_EXEC_MAX_NODE_TRAIN`) instead of 15": run(
        MXNET_EXEC_BULK_EXEC_MAX_NODE_TRAIN="100"
    ),
    "`MXNET_ENGINE_TYPE=NaiveEngine`": run(MXNET_ENGINE_TYPE="NaiveEngine"),
    "large pages (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`)": run(
        GLIBC_TUNABLES="glibc.malloc.hugetlb=1"
    ),
    f"tcmalloc (`LD_PRELOAD={TCMALLOC}`)": run(LD_PRELOAD=TCMALLOC),
    f"jemalloc (`LD_PRELOAD={JEMALLOC}`)": run(LD_PRELOAD=JEMALLOC),
}


def main() -> None:
    """Measure the selected choices, print the table and insert it into the docs."""
    parser = argparse.ArgumentParser(description="A run as it is beside others.")
    parser.add_argument("--only", help="parts of choices' names, with commas between")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    parts = args.only.split(",") if args.only else [""]
    selected = [
        name for name in CHOICES if any(part in name for part in parts) and not missing(name)
    ]
    if not selected:
        parser.error(f"nothing to measure; the choices are: {'; '.join(CHOICES)}")
    before, found = report.machine(), results()
    runs = {AS_IS: Choice(), **{name: CHOICES[name] for name in selected}}
    contenders = {name: choice.contender(args.steps) for name, choice in runs.items()}
    with speed.unpacked_data() as data:
        rounds = speed.alternate(NAME, contenders, data, args.rounds)
    for name in selected:
        found[name] = [{one: taken[one] for one in (AS_IS, name)} for taken in rounds]
    report.write(NAME, found, before)
    print(table())
    report.include(speed.PAGE, f"benchmarks.{NAME}", table())


def missing(name: str) -> bool:
    """Whether the machine lacks the library that a choice preloads; prints that it is skipped."""
    for library in (TCMALLOC, JEMALLOC):
        if library in name:
            variables = {**os.environ, "LD_PRELOAD": library}
            if subprocess.run(["true"], env=variables, stderr=subprocess.PIPE).stderr:
                print(f"skipped: {name}, as there is no such library")
                return True
    return False


def results() -> Dict[str, List[Any]]:
    """The results so far: by choice, its rounds with those of the unchanged run."""
    path = report.RESULTS / f"{NAME}.json"
    measured = json.loads(path.read_text())["figures"] if path.exists() else {}
    return {name: rounds for name, rounds in measured.items() if name in CHOICES}


def table() -> str:
    """The table of all choices that have been measured, in Markdown."""
    found = results()
    head = ("choice", "images/s by default", "with the choice", "ratio", "rounds")
    return report.table(head, [cells(name, found[name]) for name in CHOICES if name in found])


def cells(name: str, rounds: Sequence[Dict[str, speed.Figures]]) -> List[str]:
    """A row of the table."""
    pairs = [[taken[one]["images_per_second"] for one in (AS_IS, name)] for taken in rounds]
    medians = (f"{statistics.median(column):.0f}" for column in zip(*pairs))
    ratio = statistics.median(other / one for one, other in pairs)
    return [name, *medians, f"{ratio:.2f}", str(len(rounds))]


if __name__ == "__main__":
    main()

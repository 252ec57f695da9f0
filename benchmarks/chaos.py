"""Runs with random faults: the outcome of each, and the time to recover.

    python -m benchmarks.chaos --trials 200 --seed 0
    python -m benchmarks.chaos --trials 100 --first 100     # or in parts, one after the other

The trials are defined in tests/integration/chaos.py. Needs root, for a tiny disk and network
namespaces. After each trial the results so far are written to results/chaos.json and the tables of
docs/reliability.md; those of trials before --first, of the same seed, are kept. Exits with 1 if a
trial failed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

from benchmarks import report
from tests.integration import chaos

FAILED = "failed"
PAGE = report.RESULTS.parents[1] / "docs" / "reliability.md"
_TABLE = re.compile(r"(?<=<!-- benchmarks.chaos -->\n).*?(?=<!-- end -->)", re.DOTALL)
_KEPT_OUTPUT = 4000  # characters of a failed trial's error


def main() -> int:
    """Run the trials, print a line for each and a summary, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=len(chaos.KINDS) * 2)
    parser.add_argument("--first", type=int, default=0, help="keep the trials before this number")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    before = report.machine()
    with tempfile.TemporaryDirectory() as folder:
        expected = chaos.straight(Path(folder))
    rows = _kept(args.seed, args.first)
    for number in range(args.first, args.first + args.trials):
        rows.append(_row(chaos.choose(args.seed, number), expected))
        summary = _summary(rows)
        path = report.write("chaos", {"seed": args.seed, **summary, "all": rows}, before)
        PAGE.write_text(with_table(PAGE.read_text(), json.loads(path.read_text())))
    for name, figure in summary.items():
        print(f"{name}: {figure}")
    return int(FAILED in summary)


def _kept(seed: int, first: int) -> List[Dict[str, Any]]:
    """The results of the trials before ``first``, if they are of that seed and these kinds."""
    path = report.RESULTS / "chaos.json"
    figures = json.loads(path.read_text())["figures"] if path.exists() else {"all": []}
    kept = [row for row in figures["all"] if row["trial"] < first]
    same = not kept or figures.get("seed", 0) == seed
    if not same or any(chaos.choose(seed, row["trial"]).kind != row["fault"] for row in kept):
        sys.exit(f"{path} is of another seed, or of other kinds of faults; begin with --first 0")
    return kept


def with_table(page: str, results: Dict[str, Any]) -> str:
    """The text of docs/reliability.md with the table of ``results``, the content of chaos.json."""
    figures, machine = results["figures"], results["machine"]
    again = [row["fault"] for row in figures["all"] if row["outcome"] == chaos.AGAIN]
    kinds = "; ".join(f"{again.count(kind)} {kind}" for kind in sorted(set(again)))
    rows = [
        ("trials", figures["trials"]),
        ("went on by themselves to the right weights", figures.get(chaos.WENT_ON, 0)),
        (
            f"ended with an error and were completed by the same command ({kinds})",
            figures.get(chaos.AGAIN, 0),
        ),
        ("neither", figures.get(FAILED, 0)),
        (
            "seconds from the fault to the next step done, median and worst",
            f"{figures['seconds to recover, median']} and {figures['seconds to recover, worst']}",
        ),
        (
            "largest difference of a weight from the undisturbed run",
            figures["largest difference of a weight"],
        ),
    ]
    gpu = "no GPU" if machine["gpu"] == "none" else machine["gpu"]
    where = (
        f"`{results['command']}` on {machine['cores']} cores, {machine['cpu']}, {gpu}, "
        f"{results['date']}; the load was {machine['load before']} before.\n"
    )
    tables = f"{report.table(['', ''], rows)}\n\n{_by_kind(figures['all'])}"
    return _TABLE.sub(lambda _: f"{tables}\n\n{where}", page)


def _by_kind(rows: List[Dict[str, Any]]) -> str:
    """A row for each kind of fault, those that took longest to recover first."""
    lines = []
    for kind in {row["fault"]: None for row in rows}:
        alike = [row for row in rows if row["fault"] == kind]
        outcomes = [row["outcome"] for row in alike]
        worst = max((row.get("recovery s") or 0.0 for row in alike), default=0.0)
        counts = [outcomes.count(outcome) for outcome in (chaos.WENT_ON, chaos.AGAIN, FAILED)]
        lines.append((kind, len(alike), *counts, worst or "-"))
    lines.sort(key=lambda line: 0.0 if line[-1] == "-" else -line[-1])
    head = ["fault", "trials", "went on", "completed again", "neither", "worst recovery, s"]
    return report.table(head, lines)


def _row(trial: chaos.Trial, expected: Dict[str, Any]) -> Dict[str, Any]:
    row: Dict[str, Any] = {"trial": trial.number, "fault": trial.kind, "ranks": trial.ranks}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = chaos.run_trial(trial, Path(folder), expected)
        except Exception as error:  # whatever it is, the other trials still run
            row["outcome"] = FAILED
            row["because"] = f"{type(error).__name__}: {error}"[-_KEPT_OUTPUT:]
        else:
            row["outcome"] = result.outcome
            if result.because:
                row["because"] = result.because
            row["recovery s"] = result.recovery and round(result.recovery, 1)
            row["difference"] = float(f"{result.difference:.1e}")
    row["seconds"] = round(time.monotonic() - began, 1)
    print("  ".join(f"{value}" for value in row.values()), flush=True)
    return row


def _summary(rows: List[Dict[str, Any]]) -> Dict[str, Any]:
    recoveries = [row["recovery s"] for row in rows if row.get("recovery s") is not None]
    outcomes = [row["outcome"] for row in rows]
    return {
        "trials": len(rows),
        **{outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        "seconds to recover, median": round(statistics.median(recoveries), 1)
        if recoveries
        else None,
        "seconds to recover, worst": max(recoveries, default=None),
        "largest difference of a weight": max(row.get("difference", 0.0) for row in rows),
    }


if __name__ == "__main__":
    sys.exit(main())

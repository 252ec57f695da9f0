"""Many runs in which something goes wrong: what came of each, and how long it took to recover.

    python -m benchmarks.chaos --trials 52 --seed 0

The trials are those of tests/integration/chaos.py. Needs root, for a tiny disk and for networks of
its own. Exits with 1 when a trial did not hold.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

from benchmarks import report
from tests.integration import chaos


def main() -> int:
    """Make the trials, print a line for each and a summary, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=len(chaos.KINDS) * 2)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    before = report.machine()
    with tempfile.TemporaryDirectory() as folder:
        expected = chaos.straight(Path(folder))
    rows = [
        _row(chaos.choose(args.seed, number), expected)
        for number in range(args.first, args.first + args.trials)
    ]
    summary = _summary(rows)
    for name, figure in summary.items():
        print(f"{name}: {figure}")
    report.write("chaos", {**summary, "all": rows}, before)
    return int(any("failed" in row["outcome"] for row in rows))


def _row(trial: chaos.Trial, expected: Dict[str, Any]) -> Dict[str, Any]:
    row: Dict[str, Any] = {"trial": trial.number, "fault": trial.kind, "ranks": trial.ranks}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = chaos.run_trial(trial, Path(folder), expected)
        except AssertionError as error:
            row["outcome"] = f"failed: {error}"
        else:
            row["outcome"] = result.outcome
            row["recovery s"] = result.recovery and round(result.recovery, 1)
            row["difference"] = float(f"{result.difference:.1e}")
    row["seconds"] = round(time.monotonic() - began, 1)
    print("  ".join(f"{value}" for value in row.values()), flush=True)
    return row


def _summary(rows: List[Dict[str, Any]]) -> Dict[str, Any]:
    recoveries = [row["recovery s"] for row in rows if row.get("recovery s") is not None]
    outcomes = [row["outcome"].split(":")[0] for row in rows]
    return {
        "trials": len(rows),
        **{outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        "seconds to recover, median": round(statistics.median(recoveries), 1),
        "seconds to recover, worst": max(recoveries),
        "largest difference of a weight": max(row.get("difference", 0.0) for row in rows),
    }


if __name__ == "__main__":
    sys.exit(main())

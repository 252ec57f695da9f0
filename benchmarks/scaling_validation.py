"""Validates the scaling model on real steps of 2 to 4 ranks on throttled links.

    python -m benchmarks.scaling_validation [--rates none,10gbit,1gbit,100mbit] [--ranks 2,3,4]

As root: each rank is a host of its own (a network namespace, tests/integration/hosts.py) whose
sending ``tc tbf`` throttles. Measured are the whole steps, and what the model is fed with, by as
many ranks: layers and update, and, without a throttle, a small and a large sum. The link's
bandwidth is the rate given to ``tbf``; nothing is fitted to the throttled steps. The table goes
into ``docs/scaling.md``. Figures of rates and ranks that are not selected stay in
results/scaling_validation.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Sequence

from benchmarks import report
from benchmarks.scaling_model import Cluster, Horovod, Layer, Link, compute, scaled, step
from benchmarks.scaling_rank import WAYS
from tests.integration.hosts import Hosts, slurm_variables, why_not

RATES = {"none": None, "10gbit": 10e9, "1gbit": 1e9, "100mbit": 100e6}  # bits a second
ROUNDS = {"none": 9, "10gbit": 9, "1gbit": 5, "100mbit": 2}
SETTINGS = {"OMP_NUM_THREADS": "1"}
SECONDS = 340
NEAR = 0.2  # a prediction's error
NAME = "scaling_validation"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"


def measure(ranks: int, rate: str, rounds: int, folder: Path) -> Dict[str, Any]:
    """Run benchmarks/scaling_rank.py on ``ranks`` hosts; returns its results."""
    result = folder / f"{rate}-{ranks}.json"
    with Hosts(ranks, folder) as hosts:
        if RATES[rate]:
            hosts.throttle(rate)
        command = [sys.executable, "-m", "launch", "slurm-rank", "--", "python", "-m"]
        command += ["benchmarks.scaling_rank", str(result), f"--rounds={rounds}"]
        command += ["--probe"] if rate == "none" else []
        running = [
            hosts.start(name, command, {**slurm_variables(number, ranks), **SETTINGS})
            for number, name in enumerate(hosts.names)
        ]
        said = [process.communicate(timeout=SECONDS)[0] for process in running]
    if not result.exists():
        raise SystemExit(f"{rate}, {ranks} ranks failed:\n" + "\n".join(said))
    return dict(json.loads(result.read_text()))


def predictions(found: Dict[str, Any], probe: Dict[str, float], rate: str, ranks: int) -> Any:
    """Seconds of a step in each way.

    Args:
        found: what was measured with this rate and as many ranks: its layers and update go in.
        probe: as many ranks', without a throttle.

    The software's part of a sum is work of the cores: it overlaps with the wire, but not with
    backward.
    """
    wire = 8 / RATES[rate] if RATES[rate] else 0.0
    layers = [Layer(**layer) for layer in found["layers"]]
    # Layers that ran one by one, as long together as they are within a step.
    layers = scaled(layers, (found["compute"] - found["update"]) / compute(layers))
    size = sum(layer.gradient_bytes for layer in layers)
    result = {}
    for way, settings in WAYS.items():
        fp16 = settings.get("fp16", False)
        summed = size / 2 if fp16 else size
        sent = 2 * (ranks - 1) / ranks * summed  # bytes, by a rank in a ring
        software = probe["half_sum" if fp16 else "large_sum"] - probe["small_sum"]
        link = Link(0.0, 1 / max(wire, software / sent))
        horovod = Horovod(
            bucket_bytes=settings["bucket_mb"] * 2**20,
            fp16=fp16,
            cycle=probe["cycle"],
            request=max(0.0, probe["small_sum"] - probe["cycle"] / 2),
            norm_request=probe["norm_sum"],
            host=software / summed,
        )
        sync = settings.get("sync", False)
        result[way] = step(layers, Cluster(ranks, link), horovod, sync, found["update"]).step
    return result


def compare(runs: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Measured and predicted seconds of each way, for each rate and number of ranks."""
    return [
        {
            "link": rate,
            "ranks": int(ranks),
            "measured": {way: found[way] for way in WAYS},
            "predicted": predictions(found, runs["none"][ranks]["probe"], rate, int(ranks)),
        }
        for rate, by_ranks in sorted(runs.items(), key=lambda item: list(RATES).index(item[0]))
        for ranks, found in sorted(by_ranks.items())
        if WAYS.keys() <= found.keys()  # of an earlier version otherwise
    ]


def cells(row: Dict[str, Any]) -> List[str]:
    """A row of the table: measured -> predicted (error)."""
    measured, predicted = row["measured"], row["predicted"]
    return [
        row["link"],
        str(row["ranks"]),
        *(
            f"{measured[way]:.2f} -> {predicted[way]:.2f} "
            f"({100 * (predicted[way] / measured[way] - 1):+.0f} %)"
            for way in measured
        ),
    ]


def summary(rows: Sequence[Dict[str, Any]]) -> str:
    """The table, and how many of its predictions are accurate, in Markdown."""
    near = {
        (row["link"], row["ranks"], way): abs(row["predicted"][way] / row["measured"][way] - 1)
        <= NEAR
        for row in rows
        for way in row["measured"]
    }
    throttled = [hit for (link, *_), hit in near.items() if RATES[link]]
    return (
        f"{report.table(('link', 'ranks', *rows[0]['measured']), [cells(row) for row in rows])}\n\n"
        f"{sum(near.values())} of {len(near)} are within {100 * NEAR:.0f} %, of those on throttled "
        f"links {sum(throttled)} of {len(throttled)}."
    )


def main() -> None:
    """Measure, print the table, insert it into the docs, write results/scaling_validation.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", default=",".join(RATES))
    parser.add_argument("--ranks", default="2,3,4")
    parser.add_argument("--rounds", type=int, help=f"default: by the rate, {ROUNDS}")
    args = parser.parse_args()
    if why_not():
        parser.error(str(why_not()))
    before = report.machine()
    path = report.RESULTS / f"{NAME}.json"
    runs: Dict[str, Any] = json.loads(path.read_text())["figures"]["runs"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for rate in args.rates.split(",") if args.rates else []:
            for ranks in args.ranks.split(","):
                runs.setdefault(rate, {})[ranks] = measure(
                    int(ranks), rate, args.rounds or ROUNDS[rate], Path(folder)
                )
                print(f"measured {rate}, {ranks} ranks", flush=True)
    rows = compare(runs)
    if rows:
        print(summary(rows))
        report.include(PAGE, f"benchmarks.{NAME}", summary(rows))
    else:
        print("nothing has been measured since the ways of summing changed; give --rates")
        rows = json.loads(path.read_text())["figures"]["comparison"]
    print(report.write(NAME, {"runs": runs, "comparison": rows}, before))


if __name__ == "__main__":
    main()

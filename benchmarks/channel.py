"""Times small sums between two hosts: through their leaders' channel, and through Horovod.

    python -m benchmarks.channel

The hosts are network namespaces of this machine with a rank each (as root; see
tests/integration/hosts.py). Medians and 90th percentiles of 200 sums of 129 float64, as a norm
layer of 64 channels makes, with nothing else to do and while both ranks multiply matrices.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict

import numpy as np

from benchmarks import report
from tests.integration.hosts import Hosts, start_ranks, why_not

SUMS, NUMBERS = 200, 129
WAYS = ("channel", "Horovod")
STATES = ("idle", "computing")


def microseconds(add_up: Callable[[np.ndarray], np.ndarray], busy: bool) -> Dict[str, float]:
    """Of a sum: median and 90th percentile."""
    import mxnet as mx

    square, taken = mx.nd.ones((512, 512)), []
    for number in range(SUMS + 20):
        if busy:  # the engine computes on while this thread waits
            for _ in range(2):
                square = mx.nd.dot(square, square) * 1e-3
        start = time.perf_counter()
        add_up(np.ones(NUMBERS))
        if number >= 20:  # the first ones warm up
            taken.append(1e6 * (time.perf_counter() - start))
    mx.nd.waitall()
    median, percentile = np.percentile(taken, [50, 90])
    return {"median": round(median), "90th percentile": round(percentile)}


def measure(output: Path) -> None:
    """Run in each rank; rank 0 writes the figures."""
    from trainer import dist
    from trainer.dist import small_sums

    dist.init()
    sums = small_sums.small_sums()
    assert sums is not None, "the leaders have not connected"
    ways = {"channel": sums, "Horovod": lambda v: small_sums.allreduce_by_horovod(v, "small")}
    figures = {
        way: {state: microseconds(ways[way], state == "computing") for state in STATES}
        for way in WAYS
    }
    if dist.is_root():
        output.write_text(json.dumps(figures))
    dist.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        measure(args.rank)
        return
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    before = report.machine()
    with tempfile.TemporaryDirectory() as folder, Hosts(2, Path(folder)) as hosts:
        output = Path(folder, "figures")
        command = [sys.executable, "-m", "benchmarks.channel", "--rank", str(output)]
        ranks = start_ranks(hosts, (1, 1), command, {"OMP_NUM_THREADS": "1"})
        said = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            sys.exit("\n".join(said))
        figures = json.loads(output.read_text())
    rows = [[way, s, *figures[way][s].values()] for way in WAYS for s in STATES]
    print(f"{SUMS} sums of {NUMBERS} float64 between two hosts, microseconds; noisy")
    print(report.table(["through", "ranks", "median", "90th percentile"], rows))
    report.write("channel", figures, before)


if __name__ == "__main__":
    main()

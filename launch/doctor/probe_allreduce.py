"""Latency and bandwidth of an allreduce between the ranks that run this; rank 0 prints JSON."""

from __future__ import annotations

import json
import time
from typing import Any

from ..core.streams import answer, run

LARGE_BYTES = 45_000_000  # about the gradients of a ResNet-18
ROUNDS = 5


def main() -> int:
    """Measure both and print the report."""
    import horovod.mxnet as hvd
    import mxnet as mx

    hvd.init()
    small = _median_seconds(hvd, mx.nd.ones(1), "small")
    large = _median_seconds(hvd, mx.nd.ones(LARGE_BYTES // 4), "large")
    if hvd.rank() == 0:
        report = {
            "ranks": hvd.size(),
            "latency_ms": round(small * 1e3, 2),
            "mb_per_s": round(LARGE_BYTES / 1e6 / large, 1),
        }
        answer(json.dumps(report))
    mx.nd.waitall()
    hvd.shutdown()
    return 0


def _median_seconds(hvd: Any, array: Any, name: str) -> float:
    """Of `ROUNDS` allreduces after one that warms up; ValueError when a sum is wrong."""
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        total = hvd.allreduce(array, average=False, name=name)
        total.wait_to_read()
        seconds.append(time.perf_counter() - start)
    if float(total[0].asscalar()) != hvd.size():
        raise ValueError(f"the sum over {hvd.size()} ones is {float(total[0].asscalar())}")
    return sorted(seconds[1:])[ROUNDS // 2]


if __name__ == "__main__":
    run(main)

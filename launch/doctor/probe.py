"""What the doctor runs in processes of its own: an import that crashes must not take it along.

`python -m launch.doctor.probe libraries` prints, as JSON, what MXNet and Horovod say of themselves;
`... allreduce` the latency and bandwidth between the ranks that run it, by rank 0.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from typing import Any, Dict, List

from ..core.streams import answer, run

LARGE_BYTES = 45_000_000  # about the gradients of a ResNet-18
ROUNDS = 5


def libraries() -> int:
    """Print the report."""
    boards = ("tensorboardX", "tensorboard")
    answers: Dict[str, Any] = {
        "mxnet": _attempt(_mxnet),
        "horovod": _attempt(_horovod),
        "missing": [name for name in boards if importlib.util.find_spec(name) is None],
    }
    answer(json.dumps(answers))
    # Last, and said apart: a kernel that crashes takes this process with it.
    if "CUDA" in answers["mxnet"].get("features", ()):
        answer(json.dumps({**answers, "gpus": _attempt(lambda: {"errors": _gpus()})}))
    return 0


def _mxnet() -> Dict[str, Any]:
    import mxnet

    features = [name for name, f in mxnet.runtime.Features().items() if f.enabled]
    return {"version": mxnet.__version__, "features": features}


def _horovod() -> Dict[str, Any]:
    import horovod
    import horovod.mxnet as hvd

    return {
        "version": horovod.__version__,
        "gloo": bool(hvd.gloo_built()),
        "mpi": bool(hvd.mpi_built()),
        "nccl": int(hvd.nccl_built()),
    }


def _gpus() -> List[str]:
    """For each GPU that MXNet sees, why it cannot compute there; empty where it can."""
    import mxnet

    errors = []
    for number in range(mxnet.context.num_gpus()):
        try:
            two = (mxnet.nd.ones((1,), ctx=mxnet.gpu(number)) + 1).asscalar()
            errors.append("" if two == 2 else f"1 + 1 is {two}")
        except mxnet.MXNetError as error:
            errors.append(str(error).strip().splitlines()[-1])
    return errors


def _attempt(probe: Any) -> Dict[str, Any]:
    try:
        return dict(probe())
    except Exception as error:  # whatever an import can raise is the finding
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def allreduce() -> int:
    """Measure both and print the report."""
    import horovod.mxnet as hvd
    import mxnet as mx

    hvd.init()
    small = _median_seconds(hvd, mx.nd.ones(1), "small")
    large = _median_seconds(hvd, mx.nd.ones(LARGE_BYTES // 4), "large")
    if hvd.rank() == 0:
        report = {
            "ranks": hvd.size(),
            "interface": os.environ.get("HOROVOD_GLOO_IFACE", "any interface"),
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
    run({"libraries": libraries, "allreduce": allreduce}[sys.argv[1]])

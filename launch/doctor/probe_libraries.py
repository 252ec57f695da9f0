"""What MXNet and Horovod say of themselves, as JSON; `launch doctor` runs this in a process of its
own, because an import that crashes must not take the doctor with it."""

from __future__ import annotations

import importlib.util
import json
import platform
from typing import Any, Dict, List

from ..core.streams import answer, run


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

    return [_kernel(mxnet, mxnet.gpu(number)) for number in range(mxnet.context.num_gpus())]


def _kernel(mxnet: Any, gpu: Any) -> str:
    try:
        two = (mxnet.nd.ones((1,), ctx=gpu) + 1).asscalar()
    except mxnet.MXNetError as error:
        return str(error).strip().splitlines()[-1]
    return "" if two == 2 else f"1 + 1 is {two}"


def _attempt(probe: Any) -> Dict[str, Any]:
    try:
        return dict(probe())
    except Exception as error:  # whatever an import can raise is the finding
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def main() -> int:
    """Print the report."""
    boards = ("tensorboardX", "tensorboard")
    answers: Dict[str, Any] = {
        "python": platform.python_version(),
        "mxnet": _attempt(_mxnet),
        "horovod": _attempt(_horovod),
        "missing": [name for name in boards if importlib.util.find_spec(name) is None],
    }
    answer(json.dumps(answers))
    # Last, and said apart: a kernel that crashes takes this process with it.
    if "CUDA" in answers["mxnet"].get("features", ()):
        answer(json.dumps({**answers, "gpus": _attempt(lambda: {"errors": _gpus()})}))
    return 0


if __name__ == "__main__":
    run(main)

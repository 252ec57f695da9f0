"""The device of these tests: each runs on the CPU, and on a GPU where MXNet sees one."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # A100 and later would round to 10 bits

import mxnet as mx
import pytest

from trainer.dist import device
from trainer.dist.ranks import visible_gpus


@pytest.fixture(params=["cpu", "gpu"])
def ctx(request: pytest.FixtureRequest) -> mx.Context:
    """The context to compute on; a GPU that is there and cannot be used is an error."""
    if request.param == "gpu" and visible_gpus() == 0:
        pytest.skip("MXNet sees no GPU")
    return device.choose(request.param, local_rank=0)  # also where that one alone is visible

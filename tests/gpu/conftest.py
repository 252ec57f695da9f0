"""The device of these tests: each runs on the CPU, and on a GPU where this MXNet can use one."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # A100 and later would round to 10 bits

import mxnet as mx
import pytest

from trainer.dist import device
from trainer.errors import ConfigError


@pytest.fixture(params=["cpu", "gpu"])
def ctx(request: pytest.FixtureRequest) -> mx.Context:
    """The context to compute on."""
    try:
        return device.choose(request.param, local_rank=0)  # also where that one alone is visible
    except ConfigError as error:
        pytest.skip(str(error))

"""The C++ operator compared to the Python one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any, List, Tuple

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, nd

from launch.core.process import lacks_cause
from trainer.batch_norm import coefficients, coefficients_native
from trainer.batch_norm.coefficients_native import operator_type
from trainer.batch_norm.rank_sum import RankSum, empty_batch, registry
from trainer.dist.shared_memory import SharedMemorySum
from trainer.native import compile


def native() -> str:
    """The operator for arrays of this process on the CPU: the one in C++, unless prevented."""
    return operator_type(RankSum(None), mx.cpu())


def add_a_peer(self: RankSum, values: np.ndarray) -> np.ndarray:
    """In place of a sum over ranks: as if another rank had other samples and gradients."""
    channels, forward = divmod(values.size, 2)
    if not forward:
        return values + np.arange(values.size)
    return values + np.repeat([-4.0, 90.0, 7.0], [channels, channels, 1])


@pytest.fixture(autouse=True)
def _with_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankSum, "_allreduce", add_a_peer)


def outputs_and_gradients(
    op_type: str, shape: Tuple[int, ...], axis: int, dtype: str, scale: bool, grad_req: str
) -> List[np.ndarray]:
    """Of an operator, with other gradients for each output."""
    random = np.random.RandomState(0)
    statistics = "float32" if dtype == "float16" else dtype
    x = nd.array(random.normal(1, 2, shape), dtype=dtype)
    channels = shape[axis]
    vectors = [nd.array(random.uniform(1, 2, channels), dtype=statistics) for _ in range(4)]
    inputs = [x, *vectors[:2]]
    for array in inputs:
        array.attach_grad(grad_req)
        array.grad[:] = 1
    rank_sum = RankSum(None)
    arguments = {"rank_sum": rank_sum.serial, "axis": axis, "epsilon": 1e-5, "scale": scale}
    with autograd.record():
        outputs = nd.Custom(*inputs, *vectors[2:], op_type=op_type, **arguments)
        weighted = [y * nd.array(random.normal(size=y.shape), dtype=statistics) for y in outputs]
        nd.add_n(*(y.sum() for y in weighted)).backward()
    arrays = [*outputs[:2], *(array.grad for array in inputs), outputs[2]]
    return [array.asnumpy() for array in arrays]


@pytest.mark.parametrize("grad_req", ["write", "add"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5), ("float16", 2e-3)]
)
@pytest.mark.parametrize(
    ("shape", "axis", "scale"),
    [
        ((6, 3), 1, True),
        ((4, 3, 5, 7), 1, True),
        ((4, 3, 2, 2), 1, False),
        ((2, 3, 5), -1, True),
        ((2, 3, 5), 0, True),
    ],
)
def test_same_numbers_as_in_python(
    shape: Tuple[int, ...], axis: int, scale: bool, dtype: str, tolerance: float, grad_req: str
) -> None:
    assert native() != coefficients.OP_TYPE
    own, other = (
        outputs_and_gradients(op_type, shape, axis, dtype, scale, grad_req)
        for op_type in (native(), coefficients.OP_TYPE)
    )
    assert own[2].any()
    for a, b in zip(own, other):
        assert a.dtype == b.dtype and np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_an_empty_batch_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the sums over ranks, of moments and of gradients, nor in its own gradient."""
    arguments: Any = ((4, 3, 5), 1, "float64", True, "write")
    summed: List[np.ndarray] = []

    def noted(self: RankSum, values: np.ndarray) -> np.ndarray:
        summed.append(values.copy())
        return add_a_peer(self, values)

    monkeypatch.setattr(RankSum, "_allreduce", noted)
    for op_type in (native(), coefficients.OP_TYPE):
        with empty_batch():
            gradient_of_x = outputs_and_gradients(op_type, *arguments)[2]
        assert not gradient_of_x.any() and len(summed) == 2
        assert not any(values.any() for values in summed)
        assert outputs_and_gradients(op_type, *arguments)[2].any()
        assert all(values.any() for values in summed[2:])
        summed.clear()


def test_the_environment_and_the_device_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operator_type(RankSum(None), mx.gpu(0)) == coefficients.OP_TYPE
    monkeypatch.setenv("BATCH_NORM_NATIVE", "0")
    assert native() == coefficients.OP_TYPE


def test_without_a_compiler_python_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "load", lambda *named: None)
    monkeypatch.setattr(coefficients_native, "_load", coefficients_native._load.__wrapped__)
    assert native() == coefficients.OP_TYPE


def wait_for_ever(path: str, entered: Any) -> None:
    SharedMemorySum(os.open(path, os.O_CREAT | os.O_RDWR), 7, 1, 2)
    entered.set()
    signal.pause()


def test_a_dead_peer_is_noticed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "lost", None)
    context = multiprocessing.get_context("spawn")
    entered, path = context.Event(), str(tmp_path / "sum")
    peer = context.Process(target=wait_for_ever, args=(path, entered), daemon=True)
    peer.start()
    assert entered.wait(60)
    native()
    rank_sum = RankSum(None)
    rank_sum.shared = SharedMemorySum(os.open(path, os.O_CREAT | os.O_RDWR), 7, 0, 2)
    coefficients_native.share(rank_sum, rank_sum.shared)
    os.kill(peer.pid, signal.SIGKILL)
    vector = nd.ones(3)
    arguments = {"rank_sum": rank_sum.serial, "axis": 1, "epsilon": 1e-5, "scale": True}
    with pytest.raises(mx.MXNetError), autograd.train_mode():
        nd.Custom(nd.ones((2, 3)), *[vector] * 4, op_type=native(), **arguments)[0].asnumpy()
    said = capfd.readouterr().err
    assert "process 1 of 2 on this node ended before its turn" in said
    assert lacks_cause(True, said.splitlines()), "the launcher names the one that died"
    assert registry.lost == "process 1 of 2 on this node ended before its turn"
    peer.join()

"""Loss and accuracy: summed on the device during training, reduced over ranks when read."""

from __future__ import annotations

from typing import Dict, Iterable, List, NamedTuple, Sequence

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import dist
from ..dist.array_memory import dense_on_cpu, memory_of
from .step import StepResult

_AT_ONCE = 200  # the most arrays that multi_all_finite takes on GPUs


class NonFiniteError(RuntimeError):
    """The loss or a weight is NaN or infinite; raised on every rank at the same step."""

    def __init__(self, step: int, what: str):
        super().__init__(f"{what} at step {step}")
        self.step = step


class Means(NamedTuple):
    """Means over the training samples of all ranks in some period."""

    loss: float  # in nats
    accuracy: float  # share of samples, 0 to 1


class TrainMetrics:
    """Loss and accuracy in training, over the window since the last reading and over the epoch."""

    def __init__(
        self,
        ctx: mx.Context,
        totals: Sequence[Sequence[float]] = ((0.0,) * 3,) * 2,
        parameters: Iterable[gluon.Parameter] = (),
    ):
        """Start at the beginning of an epoch, or resume.

        Args:
            totals: the saved :meth:`totals` to resume from.
            parameters: checked for non-finite values whenever the sums are read. The loss alone
                does not show them: oneDNN's ReLU (``nn.Activation`` on CPUs) turns NaN into 0.
        """
        self._ctx, self._parameters = ctx, list(parameters)
        self._step = 0
        self._window, self._epoch = (np.array(total, np.float64) for total in totals)
        self._clear()

    def _clear(self) -> None:
        # In float64, sums of a few thousand float32 values are exact, so they do not depend on
        # where a run was interrupted.
        self._loss_sum = mx.nd.zeros((1,), ctx=self._ctx, dtype="float64")
        self._correct = mx.nd.zeros((1,), ctx=self._ctx, dtype="float64")
        self._count = 0
        # The first step whose loss was not finite. Kept on the device, because checking each loss
        # on the host would wait for every step.
        self._first_bad = mx.nd.full((1,), np.inf, ctx=self._ctx, dtype="float64")

    def add(self, step: int, result: StepResult, count: int) -> None:
        """Add one step's sums over ``count`` samples of this rank."""
        self._step = step
        loss_sum = result.loss_sum.astype("float64")
        self._loss_sum = self._loss_sum + loss_sum
        self._correct = self._correct + result.correct.astype("float64")
        self._count += count
        finite = mx.nd.contrib.isfinite(loss_sum)
        never, now = (
            mx.nd.full((1,), value, ctx=self._ctx, dtype="float64") for value in (np.inf, step)
        )
        self._first_bad = mx.nd.minimum(self._first_bad, mx.nd.where(finite, never, now))

    def totals(self) -> List[List[float]]:
        """[loss sum, correct, samples] over all ranks, of the window and of the epoch; collective.

        A run that resumes from these totals adds in the same order as this one.

        Raises:
            NonFiniteError: on every rank, if the loss of a sample or a parameter is not finite.
        """
        loss_sum, correct, first_bad = mx.nd.concat(
            self._loss_sum, self._correct, self._first_bad, dim=0
        ).asnumpy()
        # The minimum over ranks by means of a sum: one element for each rank.
        steps = np.zeros(dist.world_size())
        steps[dist.rank()] = first_bad if np.isfinite(first_bad) else -1
        own = [0.0, 0.0, 0.0] if np.isfinite(first_bad) else [loss_sum, correct, self._count]
        lost = not _all_finite(p.list_data()[0] for p in self._parameters)
        summed = dist.allreduce_sum(np.concatenate([own, [lost], steps]), "train_metrics")
        bad = summed[4:][summed[4:] >= 0]
        if len(bad):
            raise NonFiniteError(int(bad.min()), "the loss was not finite")
        if summed[3]:
            raise NonFiniteError(self._step, "the net's weights were found not finite")
        self._window += summed[:3]
        self._epoch += summed[:3]
        self._clear()
        return [self._window.tolist(), self._epoch.tolist()]

    def read(self, end: bool = True) -> Means:
        """Means over the window; ``end`` starts a new one; collective."""
        window, _ = self.totals()
        if end:
            self._window[:] = 0
        return _means(window)

    def read_epoch(self, end: bool = True) -> Means:
        """Means over the epoch so far; ``end`` starts a new one; collective."""
        _, epoch = self.totals()
        if end:
            self._epoch[:] = 0
        return _means(epoch)


def _all_finite(arrays: Iterable[mx.nd.NDArray]) -> bool:
    floats = [array for array in arrays if np.issubdtype(array.dtype, np.floating)]
    mx.nd.waitall()  # oneDNN reorders weights in place during a forward
    in_memory = [array for array in floats if dense_on_cpu(array, np.float32, np.float64)]
    # MXNet's kernel takes 60 times as long as NumPy's on CPUs.
    return all(np.isfinite(memory_of(array)).all() for array in in_memory) and _finite_by_kernel(
        [array for array in floats if not dense_on_cpu(array, np.float32, np.float64)]
    )


def _finite_by_kernel(arrays: Sequence[mx.nd.NDArray]) -> bool:
    by_dtype: Dict[type, List[mx.nd.NDArray]] = {}
    for array in arrays:
        by_dtype.setdefault(array.dtype, []).append(array)
    found = [
        mx.nd.multi_all_finite(*some, num_arrays=len(some))
        for alike in by_dtype.values()
        for some in (alike[i : i + _AT_ONCE] for i in range(0, len(alike), _AT_ONCE))
    ]
    return all(flag.asscalar() for flag in found)


def _means(totals: Sequence[float]) -> Means:
    loss_sum, correct, count = totals
    return Means(loss_sum / count, correct / count)

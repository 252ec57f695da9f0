"""Loss and accuracy: summed on the device during training, reduced over ranks when read."""

from __future__ import annotations

from operator import attrgetter
from typing import Iterable, List, NamedTuple, Optional, Sequence, Tuple

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import dist
from ..dist.array_memory import dense_on_cpu, memory_of
from ..errors import ConfigError
from ..model.loss_scale import LossScale, Reading, all_finite
from .step import StepResult

# How a parameter is trained.
_HOW = attrgetter("grad_req", "lr_mult", "wd_mult")
_KEPT = 100  # steps whose sums are arrays of their own


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
        scale: Optional[LossScale] = None,
    ):
        """Start at the beginning of an epoch, or resume from the saved :meth:`totals`.

        ``parameters``, but for constants (a mask may be -inf), are checked for non-finite values
        whenever the sums are read. The loss alone does not show them: oneDNN's ReLU turns NaN into
        0 on CPUs. ``scale`` is that of the loss, in float16, to be read with the sums.
        """
        self._scale = scale
        self.loss_scale: Optional[Reading] = None  # at the last reading
        self._parameters = [p for p in parameters if not isinstance(p, gluon.Constant)]
        self._how = [*map(_HOW, self._parameters)]
        self._step = 0
        self._window, self._epoch = (np.array(total, np.float64) for total in totals)
        self._clear()

    def _clear(self) -> None:
        # Kept on the device as they are: to look at them, or to add them up, takes time in each
        # step, and on the host would wait for it.
        self._losses: List[mx.nd.NDArray] = []
        self._corrects: List[mx.nd.NDArray] = []
        self._steps: List[int] = []
        self._count = 0

    def add(self, step: int, result: StepResult, count: int) -> None:
        """Add one step's sums over ``count`` samples of this rank."""
        self._step = step
        self._steps.append(step)
        self._losses.append(result.loss_sum)
        self._corrects.append(result.correct)
        self._count += count
        if len(self._losses) > _KEPT:
            self._losses, self._corrects = [_joined(self._losses)], [_joined(self._corrects)]

    def _own(self) -> Tuple[List[float], float]:
        """This rank's sums, in float64, and its first step whose loss was not finite, or -1."""
        if not self._steps:
            return [0.0, 0.0, 0.0], -1
        losses = _joined(self._losses).asnumpy().astype(np.float64)
        bad = ~np.isfinite(losses)
        if bad.any():
            return [0.0, 0.0, 0.0], self._steps[bad.argmax()]
        corrects = _joined(self._corrects).asnumpy().astype(np.float64)
        # Sums of a few thousand float32 values are exact, so they do not depend on where a run was
        # interrupted.
        return [losses.sum(), corrects.sum(), self._count], -1

    def totals(self) -> List[List[float]]:
        """[loss sum, correct, samples] over all ranks, of the window and of the epoch; collective.

        A run that resumes from these totals adds in the same order as this one. NonFiniteError, on
        every rank: a sample's loss or a parameter is not finite, or, in float16, gradients at any
        scale. ConfigError: parameters are not trained as they were when this began.
        """
        changed = [p.name for p, how in zip(self._parameters, self._how) if _HOW(p) != how]
        with dist.together():
            if changed:
                raise ConfigError(
                    f"{changed[0]} has been frozen, thawed or given another lr_mult or wd_mult in "
                    "mid-run, which a resume would not repeat; end the run there "
                    "(train.max_steps), and begin another one with its weights"
                )
        own, first_bad = self._own()
        # The minimum over ranks by means of a sum: one element for each rank.
        steps = np.zeros(dist.world_size())
        steps[dist.rank()] = first_bad
        lost = not _all_finite(p.list_data()[0] for p in self._parameters)
        summed = dist.allreduce_sum(np.concatenate([own, [lost], steps]), "train_metrics")
        bad = summed[4:][summed[4:] >= 0]
        if len(bad):
            raise NonFiniteError(int(bad.min()), "the loss was not finite")
        if summed[3]:
            raise NonFiniteError(self._step, "the net's weights were found not finite")
        self.loss_scale = None if self._scale is None else self._scale.read()
        if self.loss_scale is not None and self.loss_scale.scale < 1:
            raise NonFiniteError(self._step, "gradients were found not finite, loss scale or not,")
        self._window += summed[:3]
        self._epoch += summed[:3]
        self._clear()
        return [self._window.tolist(), self._epoch.tolist()]

    def read(self, end: bool = True) -> Means:
        """Means over the window; ``end`` starts a new one; collective."""
        return self._read(self._window, end)

    def read_epoch(self, end: bool = True) -> Means:
        """Means over the epoch so far; ``end`` starts a new one; collective."""
        return self._read(self._epoch, end)

    def _read(self, sums: np.ndarray, end: bool) -> Means:
        self.totals()
        means = _means(sums.tolist())
        if end:
            sums[:] = 0
        return means


def _joined(sums: List[mx.nd.NDArray]) -> mx.nd.NDArray:
    return mx.nd.concat(*sums, dim=0)


def step_means(result: StepResult, count: int) -> Means:
    """Means of one step, of ``count`` samples of this rank, once it is done; collective."""
    own = [result.loss_sum.asscalar(), result.correct.asscalar(), count]
    return _means(dist.allreduce_sum(np.array(own, np.float64), "step_means").tolist())


def _all_finite(arrays: Iterable[mx.nd.NDArray]) -> bool:
    floats = [array for array in arrays if np.issubdtype(array.dtype, np.floating)]
    mx.nd.waitall()  # oneDNN reorders weights in place during a forward
    in_memory = [array for array in floats if dense_on_cpu(array, np.float32, np.float64)]
    others = [array for array in floats if not dense_on_cpu(array, np.float32, np.float64)]
    # MXNet's kernel takes 60 times as long as NumPy's on CPUs.
    return all(np.isfinite(memory_of(array)).all() for array in in_memory) and (
        not others or bool(all_finite(others).asscalar())
    )


def _means(totals: Sequence[float]) -> Means:
    loss_sum, correct, count = totals
    return Means(loss_sum / count, correct / count)

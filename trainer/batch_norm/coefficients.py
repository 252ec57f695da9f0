"""The operator inside SyncBatchNorm: moments over all ranks, as coefficients for one rank's kernel.

MXNet's own batch norm kernel does the work on the large tensors, with gamma' and beta' for gamma
and beta, which make of its output what the moments of all ranks would; and what its gradient of x
lacks then, a line in x, is the operator's own gradient. docs/batch_norm.md ("What is computed") has
the formulas, in the names used here. Only vectors of C channels cross ranks.

All of it stays on the arrays' device, in MXNet's operators and two allreduces: the host waits for
nothing. None of its calls goes to cuDNN, which would move running statistics in forward, by another
estimate of the variance. Nor does it move them itself: MXNet does not tell its engine what a custom
operator's backward writes, and who read them next would get the old ones. See ``SyncBatchNorm``.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Tuple

import mxnet as mx
import numpy as np
from mxnet import autograd, nd

from .rank_sum import RankSum, registry

OP_TYPE = "sync_batch_norm_coefficients"


class _Moments(NamedTuple):
    """Moments of some samples for each channel: float64, (C,), on the device."""

    mean: nd.NDArray
    variance: nd.NDArray  # biased
    inverse: nd.NDArray  # 1 / sqrt(variance + epsilon)


class Coefficients(mx.operator.CustomOp):
    """(x, gamma, beta; running_mean, running_var) -> (gamma', beta', pair).

    ``pair``, (C, 2), has the mean and variance that the running statistics are to be moved by. They
    are also inputs for the sake of the engine's ordering: see :class:`RankSum`.
    """

    def __init__(self, rank_sum: RankSum, axis: int, epsilon: float, scale: bool):
        super().__init__()
        self._rank_sum = rank_sum
        # Not cuDNN's, which moves running statistics in forward; of one sample to NaN.
        self._kernel = {"axis": axis, "eps": epsilon, "fix_gamma": False, "cudnn_off": True}
        self._epsilon, self._scale = epsilon, scale

    def forward(
        self, is_train: bool, req: List[str], in_data: Any, out_data: Any, aux: Any
    ) -> None:
        x, gamma_array, beta_array = in_data
        gamma, beta = _float64(gamma_array), _float64(beta_array)
        if not self._scale:
            gamma = nd.ones_like(gamma)
        mean, variance = map(_float64, aux)
        self._is_train = is_train
        if is_train:
            self._samples = 0 if registry.batch_is_empty.value else x.size // gamma.size
            self._local = local = self._local_moments(x, gamma_array, beta_array, aux)
            self._whole = whole = self._sum_moments(local)
            self._gamma = gamma
            self._ratio = whole.inverse / local.inverse
            self._shift = whole.inverse * (local.mean - whole.mean)
            gamma, beta = gamma * self._ratio, beta + gamma * self._shift
            none = 1 - self._any
            mean = self._any * whole.mean + none * mean
            variance = self._any * whole.variance + none * variance
        pair = nd.stack(mean - nd.sqrt(variance), mean + nd.sqrt(variance), axis=1)
        _write(out_data, req, (gamma, beta, pair))

    def _local_moments(self, x: Any, gamma: Any, beta: Any, aux: Any) -> _Moments:
        with autograd.train_mode():
            _, mean, inverse = nd.BatchNorm(
                x, gamma, beta, *aux, output_mean_var=True, **self._kernel
            )
        inverse = _float64(inverse)
        variance = nd.maximum(inverse**-2 - self._epsilon, 0)
        return _Moments(_float64(mean), variance, inverse)

    def _sum_moments(self, local: _Moments) -> _Moments:
        """The moments over all ranks; this rank's own where no rank has a sample."""
        n, (mean, variance, _) = self._samples, local
        count = nd.full((1,), n, ctx=mean.context, dtype="float64")
        total = self._rank_sum.on_device(
            nd.concat(n * mean, n * (variance + mean**2), count, dim=0)
        )
        if self._rank_sum.collected is not None:
            self._rank_sum.collected = self._rank_sum.collected + total
        count, channels = total[-1:], mean.size
        self._any, self._count = (count > 0).astype("float64"), nd.maximum(count, 1)
        none = 1 - self._any
        mean = self._any * total[:channels] / self._count + none * mean
        square = self._any * total[channels:-1] / self._count
        variance = self._any * nd.maximum(square - mean**2, 0) + none * variance
        return _Moments(mean, variance, 1 / nd.sqrt(variance + self._epsilon))

    def backward(
        self, req: List[str], out_grad: Any, in_data: Any, out_data: Any, in_grad: Any, aux: Any
    ) -> None:
        x, gamma, _ = in_data
        kernel_sum, beta_sum = map(_float64, out_grad[:2])
        if not self._is_train:
            _write(in_grad, req, (nd.zeros_like(x), kernel_sum, beta_sum))
            return
        if self._samples == 0:
            kernel_sum, beta_sum = nd.zeros_like(kernel_sum), nd.zeros_like(beta_sum)
        gamma_sum = self._ratio * kernel_sum + self._shift * beta_sum
        total = self._rank_sum.on_device(nd.concat(gamma_sum, beta_sum, dim=0))
        slope, offset = self._missing_gradient(kernel_sum, beta_sum, total)
        line = [slope, offset, self._local.mean, self._local.variance]
        vectors = (array.astype(gamma.dtype) for array in line)
        d_x = nd.BatchNorm(x, *vectors, use_global_stats=True, **self._kernel)
        _write(in_grad, req, (d_x, gamma_sum, beta_sum))

    def _missing_gradient(
        self, kernel_sum: nd.NDArray, beta_sum: nd.NDArray, total: nd.NDArray
    ) -> Tuple[nd.NDArray, nd.NDArray]:
        """What the kernel's gradient of x lacks: slope and offset, (C,), of a line in (x - m) i.

        The sums are of dy (x - m) i and of dy over this rank's samples; ``total``, (2 C,), has
        those of dy (x - M) I and of dy over all ranks' samples.
        """
        if self._samples == 0:
            return nd.zeros_like(beta_sum), nd.zeros_like(beta_sum)
        channels = beta_sum.size
        gamma_mean, beta_mean = total[:channels] / self._count, total[channels:] / self._count
        scale = self._gamma * self._whole.inverse
        slope = scale * (kernel_sum / self._samples - self._ratio * gamma_mean)
        offset = scale * (beta_sum / self._samples - beta_mean - self._shift * gamma_mean)
        return slope, offset


@mx.operator.register(OP_TYPE)
class CoefficientsProp(mx.operator.CustomOpProp):
    """Declares :class:`Coefficients` to MXNet, which passes its arguments as strings."""

    def __init__(self, rank_sum: str, axis: str, epsilon: str, scale: str):
        super().__init__(need_top_grad=True)
        self._rank_sum = registry.alive[int(rank_sum)]
        self._axis = int(axis)
        self._arguments = float(epsilon), scale == "True"

    def list_arguments(self) -> List[str]:
        return ["x", "gamma", "beta"]

    def list_outputs(self) -> List[str]:
        return ["kernel_gamma", "kernel_beta", "pair"]

    def list_auxiliary_states(self) -> List[str]:
        return ["running_mean", "running_var"]

    def infer_shape(self, in_shape: List[Any]) -> Tuple[List[Any], List[Any], List[Any]]:
        channels = (in_shape[0][self._axis],)
        pair = (*channels, 2)
        return [in_shape[0], channels, channels], [channels, channels, pair], 2 * [channels]

    def infer_type(self, in_type: List[Any]) -> Tuple[List[Any], List[Any], List[Any]]:
        return in_type, 3 * [in_type[-1]], 2 * [in_type[-1]]

    def create_operator(self, ctx: Any, in_shapes: Any, in_dtypes: Any) -> Coefficients:
        return Coefficients(self._rank_sum, self._axis, *self._arguments)


def _write(targets: Any, requests: List[str], values: Any) -> None:
    """MXNet's ``CustomOp.assign`` for each target, to whose dtype the values are cast."""
    for target, request, value in zip(targets, requests, values):
        if request != "null":
            cast = value.astype(target.dtype, copy=False)
            (target + cast if request == "add" else cast).copyto(target)


def moments_of_sums(sums: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """[sum of x (C,), sum of x^2 (C,), count] -> mean and biased variance, (C,) each, float64."""
    mean, square = np.split(sums[:-1] / sums[-1], 2)
    return mean, np.maximum(square - mean**2, 0)


def _float64(array: nd.NDArray) -> nd.NDArray:
    return array.astype("float64")

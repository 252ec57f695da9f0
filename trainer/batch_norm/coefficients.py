"""The operator inside SyncBatchNorm: moments over all ranks, as coefficients for one rank's kernel.

MXNet's own batch norm kernel does the work on the large tensors. With m, v the mean and variance
of this rank's samples, M, V those of all ranks', i = 1 / sqrt(v + epsilon) and
I = 1 / sqrt(V + epsilon), what is wanted is the kernel's own output with other coefficients::

    gamma (x - M) I + beta  =  gamma' (x - m) i + beta',
    gamma' = gamma I / i,      beta' = beta + gamma I (m - M)

so the operator maps (x, gamma, beta) to (gamma', beta'), and only vectors of C channels cross
ranks. In backward the kernel subtracts this rank's means of dy and dy (x - m) i instead of those
over all ranks. The difference is linear in x: it is the operator's own gradient.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Tuple

import mxnet as mx
import numpy as np
from mxnet import autograd, nd

from ..mxnet_internals import copy_from_host
from .rank_sum import RankSum, registry

OP_TYPE = "sync_batch_norm_coefficients"


class _Moments(NamedTuple):
    """Moments of some samples for each channel: float64, (C,)."""

    samples: float  # times the positions of each
    mean: np.ndarray
    variance: np.ndarray  # biased
    inverse: np.ndarray  # 1 / sqrt(variance + epsilon)


class Coefficients(mx.operator.CustomOp):
    """(x, gamma, beta; running_mean, running_var) -> (gamma', beta', pair).

    ``pair``, (C, 2), is two samples that have the mean and variance over all ranks. The running
    statistics are inputs for the sake of the engine's ordering: see :class:`RankSum`.
    """

    def __init__(self, rank_sum: RankSum, axis: int, epsilon: float, scale: bool):
        super().__init__()
        self._rank_sum = rank_sum
        self._kernel = {"axis": axis, "eps": epsilon, "fix_gamma": False}
        self._epsilon = epsilon
        self._scale = scale

    def forward(
        self, is_train: bool, req: List[str], in_data: Any, out_data: Any, aux: Any
    ) -> None:
        x, gamma_array, beta_array = in_data
        gamma, beta = _float64(gamma_array), _float64(beta_array)
        if not self._scale:
            gamma = np.ones_like(gamma)
        mean, variance = (_float64(running) for running in aux)
        self._is_train = is_train
        if is_train:
            self._local = local = self._local_moments(x, gamma_array, beta_array, aux)
            self._whole = whole = self._sum_moments(local)
            self._gamma = gamma
            self._ratio = whole.inverse / local.inverse
            self._shift = whole.inverse * (local.mean - whole.mean)
            gamma, beta = gamma * self._ratio, beta + gamma * self._shift
            if whole.samples:
                mean, variance = whole.mean, whole.variance
        pair = mean[:, None] + np.sqrt(variance)[:, None] * [-1, 1]
        _write(out_data, req, (gamma, beta, pair))

    def _local_moments(self, x: Any, gamma: Any, beta: Any, aux: Any) -> _Moments:
        with autograd.train_mode():
            _, mean, inverse = nd.BatchNorm(
                x, gamma, beta, *aux, output_mean_var=True, **self._kernel
            )
        inverse = _float64(inverse)
        variance = np.maximum(inverse**-2 - self._epsilon, 0)
        samples = 0 if registry.batch_is_empty.value else x.size // gamma.size
        return _Moments(samples, _float64(mean), variance, inverse)

    def _sum_moments(self, local: _Moments) -> _Moments:
        """The moments over all ranks; this rank's own where no rank has a sample."""
        n, mean, variance, _ = local
        total = self._rank_sum(np.concatenate([n * mean, n * (variance + mean**2), [n]]))
        if self._rank_sum.collected is not None:
            self._rank_sum.collected = self._rank_sum.collected + total
        if total[-1] == 0:
            return local
        mean, variance = moments_of_sums(total)
        return _Moments(total[-1], mean, variance, 1 / np.sqrt(variance + self._epsilon))

    def backward(
        self, req: List[str], out_grad: Any, in_data: Any, out_data: Any, in_grad: Any, aux: Any
    ) -> None:
        x, gamma, _ = in_data
        kernel_sum, beta_sum = (_float64(gradient) for gradient in out_grad[:2])
        if not self._is_train:
            _write(in_grad, req, (nd.zeros_like(x), kernel_sum, beta_sum))
            return
        if self._local.samples == 0:
            kernel_sum, beta_sum = np.zeros_like(kernel_sum), np.zeros_like(beta_sum)
        gamma_sum = self._ratio * kernel_sum + self._shift * beta_sum
        total = self._rank_sum(np.concatenate([gamma_sum, beta_sum]))
        slope, offset = self._missing_gradient(kernel_sum, beta_sum, *np.split(total, 2))
        line = nd.empty((4, gamma.size), ctx=gamma.context, dtype=gamma.dtype)
        copy_from_host(line, np.stack([slope, offset, self._local.mean, self._local.variance]))
        d_x = nd.BatchNorm(x, *line, use_global_stats=True, **self._kernel)
        _write(in_grad, req, (d_x, gamma_sum, beta_sum))

    def _missing_gradient(
        self,
        kernel_sum: np.ndarray,
        beta_sum: np.ndarray,
        gamma_total: np.ndarray,
        beta_total: np.ndarray,
    ) -> Tuple[np.ndarray, np.ndarray]:
        """What the kernel's gradient of x lacks: slope and offset, (C,), of a line in (x - m) i.

        Args:
            kernel_sum: sum of dy (x - m) i over this rank's samples, as the kernel computes it.
            beta_sum: sum of dy over this rank's samples.
            gamma_total, beta_total: sums of dy (x - M) I and of dy over all ranks' samples.
        """
        local, whole = self._local, self._whole
        if local.samples == 0:
            return np.zeros_like(beta_sum), np.zeros_like(beta_sum)
        gamma_mean, beta_mean = gamma_total / whole.samples, beta_total / whole.samples
        scale = self._gamma * whole.inverse
        slope = scale * (kernel_sum / local.samples - self._ratio * gamma_mean)
        offset = scale * (beta_sum / local.samples - beta_mean - self._shift * gamma_mean)
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
    """MXNet's ``CustomOp.assign`` for each target, without its overhead for NumPy vectors."""
    for target, request, value in zip(targets, requests, values):
        if request == "null":
            continue
        if isinstance(value, np.ndarray):
            copy_from_host(target, value + target.asnumpy() if request == "add" else value)
        else:
            (target + value if request == "add" else value).copyto(target)


def moments_of_sums(sums: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """[sum of x (C,), sum of x^2 (C,), count] -> mean and biased variance, (C,) each, float64."""
    mean, square = np.split(sums[:-1] / sums[-1], 2)
    return mean, np.maximum(square - mean**2, 0)


def _float64(array: mx.nd.NDArray) -> np.ndarray:
    return array.asnumpy().astype(np.float64)

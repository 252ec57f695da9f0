"""One model's running statistics of batch norm, from ranks that have each their own.

Means and variances are merged over ranks (:func:`merge`) before a model is evaluated or saved, or
recomputed exactly by a pass over data (:func:`calibrate`). docs/batch_norm.md has the mathematics.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from typing import Any, Dict, Iterable, List, Tuple

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon, nd

from .. import dist
from ..mxnet_internals import (
    is_statistic,
    kernel_arguments,
    mark_as_statistic,
    ordered_parameters,
    own_parameters,
)
from .coefficients import moments_of_sums
from .convert import connect, convert_sync_batch_norm, imported_statistics, layers_kept, layers_of
from .rank_sum import empty_batch


def parameters(net: gluon.Block) -> List[gluon.Parameter]:
    """The running means and variances: parameters that Gluon marks as not differentiable.

    Frozen weights (``grad_req`` null) are not among them: they are the same on every rank.
    """
    return [p for p in ordered_parameters(net) if is_statistic(p)]


def mark_imported(net: gluon.Block) -> None:
    """Have :func:`parameters` find those of SymbolBlocks, which Gluon does not mark."""
    for parameter in imported_statistics(net):
        mark_as_statistic(parameter)


def other_parameters(net: gluon.Block) -> List[gluon.Parameter]:
    """The running statistics of layers other than Gluon's batch norm."""
    of_norms = {id(p) for layer in layers_of(net) for p in own_parameters(layer).values()}
    return [p for p in parameters(net) if id(p) not in of_norms]


def average_others(net: gluon.Block, count: int) -> None:
    """Replace :func:`other_parameters` by their weighted mean over ranks; collective.

    ``count`` is as for :func:`merge`.
    """
    others = other_parameters(net)
    if others:
        means = _means([parameter.data().asnumpy() for parameter in others], count)
        for parameter, values in zip(others, means):
            parameter.set_data(nd.array(values, dtype=parameter.dtype))


def _means(arrays: List[np.ndarray], count: int) -> List[np.ndarray]:
    """Of each over ranks, float64, weighted by each rank's ``count``; collective."""
    flat = np.concatenate([*(array.astype(np.float64).ravel() for array in arrays), [1.0]])
    total = dist.allreduce_sum(count * flat, "running_statistics.means")
    if total[-1] == 0:
        raise ValueError("the ranks' counts are all 0; give each the number of its samples")
    means = np.split(total[:-1] / total[-1], np.cumsum([array.size for array in arrays])[:-1])
    return [mean.reshape(array.shape) for mean, array in zip(means, arrays)]


def merge(net: gluon.Block, count: int) -> None:
    """Give every rank the same running statistics, merged from all ranks'; collective.

    Means are exact, variances approximate (docs/batch_norm.md, "Merging and calibrating");
    :func:`calibrate` gives exact ones. Statistics of layers other than batch norm are averaged.

    Args:
        count: this rank's weight: its number of training samples; ValueError where all are 0.
    """
    mark_imported(net)
    layers = _moving_layers(net)
    moments = []
    for layer in layers:
        running = layer.running_mean.data(), layer.running_var.data()
        mean, variance = (array.asnumpy().astype(np.float64) for array in running)
        moments.append(np.append(mean, variance + mean**2))
    for layer, own in zip(layers, _means(moments, count)):
        _set_statistics(layer, np.append(own, 1))
    average_others(net, count)


def calibrate(net: gluon.Block, batches: Iterable[Tuple[mx.nd.NDArray, int]]) -> None:
    """Replace running statistics by the exact ones over ``batches`` of all ranks; collective.

    In one pass every layer normalizes by its global batch, as in synced training, so that the
    result depends on the weights and the global batches alone: see docs/batch_norm.md.

    Args:
        batches: this rank's shard of each global batch, (data, number of samples); one placeholder
            sample and 0 where the shard is empty. The same number on every rank, at least one.

    Raises:
        ValueError: a batch's number is not that of its samples, there is no batch, or a layer's
            class overrides the forward of Gluon's batch norm.
    """
    moving = _moving_layers(net)
    with layers_kept(net):
        convert_sync_batch_norm(net)
        connect(net)
        for layer in moving:
            device = layer.running_mean.list_ctx()[0]
            layer.rank_sum.collected = nd.zeros(1, ctx=device, dtype="float64")
        for data, count in batches:
            if count not in (0, len(data)):
                raise ValueError(
                    f"a calibration batch of {len(data)} samples says it has {count}; it must be "
                    "all of them, or 0 for a placeholder sample"
                )
            with empty_batch() if count == 0 else contextlib.nullcontext(), autograd.train_mode():
                net(data)
            mx.nd.waitall()
        sums = [layer.rank_sum.collected.asnumpy() for layer in moving]
    if any(s[-1] == 0 for s in sums):
        raise ValueError("calibration saw no sample on any rank; give it at least one batch")
    for layer, s in zip(moving, sums):
        _set_statistics(layer, s)


def move_with_input_gradient(net: gluon.Block) -> bool:
    """Whether a layer has neither gamma nor beta (the first one of a ResNet V2).

    MXNet moves running statistics in backward, which leaves out a layer that needs no gradient.
    Asked in every step: a layer may be frozen (``use_global_stats``) or unfrozen meanwhile.
    """
    return any(not kernel["use_global_stats"] for kernel in _without_weights(weakref.ref(net)))


@functools.lru_cache(maxsize=8)  # nets of one program: to walk through one takes microseconds
def _without_weights(net: weakref.ref[gluon.Block]) -> List[Dict[str, Any]]:
    """The arguments of the layers with neither gamma nor beta: the layers' own dicts."""
    kernels = [(kernel_arguments(layer), layer) for layer in layers_of(net())]
    return [kernel for kernel, layer in kernels if kernel["fix_gamma"] and is_statistic(layer.beta)]


def _moving_layers(net: gluon.Block) -> List[Any]:
    """The layers whose running statistics are updated in training."""
    return [layer for layer in layers_of(net) if not kernel_arguments(layer)["use_global_stats"]]


def _set_statistics(layer: Any, sums: np.ndarray) -> None:
    statistics = moments_of_sums(sums)
    for parameter, values in zip((layer.running_mean, layer.running_var), statistics):
        parameter.set_data(nd.array(values, dtype=parameter.dtype))

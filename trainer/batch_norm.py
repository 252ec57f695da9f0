"""Batch normalization over the samples of all ranks (Ioffe and Szegedy, ICML 2015).

:class:`SyncBatchNorm` stands in for ``mxnet.gluon.nn.BatchNorm``: same arguments, same parameters,
same running statistics, but mean and variance are those of the global batch, however its samples
are spread over ranks. :func:`convert_sync_batch_norm` turns a net's layers into it and
:func:`revert_sync_batch_norm` turns them back.

Where ranks normalize on their own, running_statistics.py makes one model of theirs.
docs/batch_norm.md has the mathematics and the cost.
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, List

import numpy as np
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn

from . import dist
from .batch_norm_native import operator_type
from .batch_norm_op import RankSum, empty_batch

__all__ = [
    "SyncBatchNorm",
    "check_convertible",
    "clear_cached_graphs",
    "connect",
    "convert_sync_batch_norm",
    "empty_batch",
    "is_synced",
    "layers_kept",
    "layers_of",
    "revert_sync_batch_norm",
]

_PlainBatchNorm = nn.basic_layers._BatchNorm  # base of nn.BatchNorm and nn.BatchNormReLU


class SyncBatchNorm(nn.BatchNorm):
    """``nn.BatchNorm`` with the mean and variance of all ranks' samples.

    Arguments, parameters (gamma, beta, running_mean, running_var: (C,), float32 for float16
    data), input and output are those of ``mxnet.gluon.nn.BatchNorm``. Local batches may differ
    in size; for an empty one see :func:`empty_batch`. Training reduces 2C + 1 numbers in forward
    and 2C in backward, as float64; in inference, with ``use_global_stats`` and on one rank this is
    plain batch norm. Each process uses one device.

    Layers find their peers by order of creation, which must be the same on every rank.

    Args:
        process_set: the Horovod process set whose ranks share statistics; None for all ranks.
    """

    def __init__(
        self,
        axis: int = 1,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        center: bool = True,
        scale: bool = True,
        use_global_stats: bool = False,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        running_mean_initializer: Any = "zeros",
        running_variance_initializer: Any = "ones",
        in_channels: int = 0,
        process_set: Any = None,
        **kwargs: Any,
    ):
        super().__init__(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            use_global_stats=use_global_stats,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            running_mean_initializer=running_mean_initializer,
            running_variance_initializer=running_variance_initializer,
            in_channels=in_channels,
            **kwargs,
        )
        self._plain_class = nn.BatchNorm
        self.rank_sum = RankSum(process_set)

    def hybrid_forward(
        self, F: Any, x: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any
    ) -> Any:
        """``x``, any shape with C channels along ``axis`` -> the same shape and dtype."""
        inference = F is nd and not autograd.is_training()
        alone = self.rank_sum.size == 1 and self.rank_sum.collected is None
        if inference or alone or self._kwargs["use_global_stats"]:
            return super().hybrid_forward(F, x, gamma, beta, running_mean, running_var)
        # Without the copy a graph reshapes x itself, and both kernels get it in the slower layout.
        copy = x if F is nd else F.add_n(x)
        gamma, beta, pair = F.Custom(
            # The reshape forces MXNet's default layout. For an input in oneDNN's layout MXNet makes
            # a temporary array, which is freed before the operator's thread has read it.
            F.reshape(copy, shape=(-2,)),
            gamma,
            beta,
            running_mean,
            running_var,
            op_type=operator_type(self.rank_sum, self.gamma.list_ctx()[0]),
            rank_sum=self.rank_sum.serial,
            axis=self._kwargs["axis"],
            epsilon=self._kwargs["eps"],
            scale=not self._kwargs["fix_gamma"],
        )
        # MXNet updates running statistics in backward. This kernel does so from the pair, which has
        # the moments of all ranks; the main kernel, with momentum 1, leaves them alone.
        running = running_mean, running_var
        kernel = {**self._kwargs, "fix_gamma": False}
        moved = F.BatchNorm(pair, gamma, beta, *running, **{**kernel, "axis": 0})
        gamma = F.slice_like(gamma, moved, axes=(0,))  # a no-op that makes `moved` part of backward
        y = F.BatchNorm(x, gamma, beta, *running, name="fwd", **{**kernel, "momentum": 1})
        return F.relu(y) if self.fuse_relu else y


def convert_sync_batch_norm(net: gluon.Block, process_set: Any = None) -> gluon.Block:
    """Turn every batch norm layer of ``net`` into a SyncBatchNorm, in place; returns ``net``.

    Works on any tree of Blocks, hybridized or not, initialized or not. Each layer stays the same
    object, with its parameters, names and hooks, so references to it stay valid. Layers that are
    synced already move to ``process_set``. Convert again after the number of ranks has changed.

    Raises:
        ValueError: a layer's class overrides the forward of Gluon's batch norm.
    """
    check_convertible(net)
    for layer in layers_of(net):
        if not isinstance(layer, SyncBatchNorm):
            layer._plain_class = type(layer)
            layer.__class__ = SyncBatchNorm
        layer.rank_sum = RankSum(process_set)
    clear_cached_graphs(net)
    return net


def connect(net: gluon.Block) -> None:
    """Set up the shared memory of the layers that sync over all ranks; collective.

    Otherwise each layer does so in its first training step, through Horovod collectives one after
    another, which is slow where Horovod's cycle time is long.
    """
    for layer in layers_of(net):
        rank_sum, channels = vars(layer).get("rank_sum"), layer.running_mean.shape[0]
        if rank_sum is not None and rank_sum.process_set is None and channels:
            rank_sum.connect(2 * channels + 1, _sum_over_ranks)


def _sum_over_ranks(values: np.ndarray) -> np.ndarray:
    return dist.allreduce_sum(values, "batch_norm.connect")


def revert_sync_batch_norm(net: gluon.Block) -> gluon.Block:
    """Turn each SyncBatchNorm of ``net`` back to its original class, in place; returns ``net``."""
    for layer in layers_of(net):
        if isinstance(layer, SyncBatchNorm):
            _revert(layer)
    clear_cached_graphs(net)
    return net


@contextlib.contextmanager
def layers_kept(net: gluon.Block) -> Iterator[None]:
    """Within it layers of ``net`` may be converted; afterwards they are what they were before."""
    layers = layers_of(net)
    rank_sums = [vars(layer).get("rank_sum") for layer in layers]
    try:
        yield
    finally:
        for layer, rank_sum in zip(layers, rank_sums):
            if rank_sum is not None:
                layer.rank_sum = rank_sum
            elif isinstance(layer, SyncBatchNorm):
                _revert(layer)
        clear_cached_graphs(net)


def is_synced(net: gluon.Block) -> bool:
    """Whether any layer of ``net`` is a SyncBatchNorm."""
    return any(isinstance(layer, SyncBatchNorm) for layer in layers_of(net))


def _revert(layer: SyncBatchNorm) -> None:
    plain_class = layer._plain_class
    del layer._plain_class, layer.rank_sum
    layer.__class__ = plain_class


def check_convertible(net: gluon.Block) -> None:
    """Refuse a net that :func:`convert_sync_batch_norm` cannot convert.

    Raises:
        ValueError: a layer's class overrides the forward of Gluon's batch norm, or a SymbolBlock
            has batch norm.
    """
    imported = next(iter(imported_statistics(net)), None)
    if imported is not None:
        raise ValueError(
            f"{imported.name} belongs to a SymbolBlock, whose batch norm cannot be synced over "
            "ranks; make the net in Python and take the weights by its load_parameters"
        )
    for layer in layers_of(net):
        cls = type(layer)
        plain = cls.hybrid_forward is _PlainBatchNorm.hybrid_forward
        plain = plain and cls.forward is gluon.HybridBlock.forward
        if not plain and not isinstance(layer, SyncBatchNorm):
            raise ValueError(
                f"{layer.name} is a {cls.__name__}, which has a forward of its own and cannot be "
                "synced over ranks; use mxnet.gluon.nn.BatchNorm"
            )


def imported_statistics(net: gluon.Block) -> List[gluon.Parameter]:
    """The running statistics within SymbolBlocks."""
    found: List[gluon.Parameter] = []

    def collect(block: gluon.Block) -> None:
        if isinstance(block, gluon.SymbolBlock):
            _, symbol = block._cached_graph
            found.extend(block.params[name] for name in symbol.list_auxiliary_states())

    net.apply(collect)
    return found


def layers_of(net: gluon.Block) -> List[Any]:
    """Gluon's batch norm layers within ``net``, each once, in the order of its children."""
    layers: List[Any] = []

    def collect(block: gluon.Block) -> None:
        if isinstance(block, _PlainBatchNorm) and not any(block is layer for layer in layers):
            layers.append(block)

    net.apply(collect)
    return layers


def clear_cached_graphs(net: gluon.Block) -> None:
    """Make hybridized blocks trace their layers again in the next forward."""
    net.apply(
        lambda block: block._clear_cached_op() if isinstance(block, gluon.HybridBlock) else None
    )

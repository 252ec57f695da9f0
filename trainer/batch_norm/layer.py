"""Batch normalization over the samples of all ranks (Ioffe and Szegedy, ICML 2015).

Where ranks normalize on their own, running_statistics.py makes one model of theirs.
docs/batch_norm.md has the mathematics and the cost.
"""

from __future__ import annotations

from typing import Any

from mxnet import autograd, nd
from mxnet.gluon import nn

from ..mxnet_internals import kernel_arguments
from .coefficients_native import operator_type
from .rank_sum import RankSum


class SyncBatchNorm(nn.BatchNorm):
    """``nn.BatchNorm`` with the mean and variance of all ranks' samples.

    Arguments, parameters (gamma, beta, running_mean, running_var: (C,), float32 for float16
    data), input and output are those of ``mxnet.gluon.nn.BatchNorm``. Local batches may differ
    in size; for an empty one see :func:`empty_batch`. Training reduces 2C + 1 numbers in forward
    and 2C in backward, as float64; in inference, with ``use_global_stats`` and on one rank this is
    plain batch norm. Each process uses one device.

    Layers find their peers by the order in which they are first used (called, or compiled), which
    must be the same on every rank; whatever else a rank has made does not count.

    Args:
        process_set: the Horovod process set whose ranks share statistics; None for all ranks.
    """

    def __init__(self, *args: Any, process_set: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.plain_class = nn.BatchNorm
        self.rank_sum = RankSum(process_set)

    def hybrid_forward(
        self, F: Any, x: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any
    ) -> Any:
        """``x``, any shape with C channels along ``axis`` -> the same shape and dtype."""
        # cuDNN's running variance is the unbiased one, NaN for a single sample; MXNet's own kernel
        # computes on GPUs what it does on CPUs.
        kernel = {**kernel_arguments(self), "cudnn_off": True}
        running = running_mean, running_var
        inference = F is nd and not autograd.is_training()
        if inference or kernel["use_global_stats"]:
            return super().hybrid_forward(F, x, gamma, beta, *running)
        if self.rank_sum.size == 1 and self.rank_sum.collected is None:
            y = F.BatchNorm(x, gamma, beta, *running, name="fwd", **kernel)
            return F.relu(y) if self.fuse_relu else y
        self.rank_sum.used()
        # Without the copy a graph reshapes x itself, and both kernels get it in the slower layout.
        copy = x if F is nd else F.add_n(x)
        gamma, beta, pair = F.Custom(
            # The reshape forces MXNet's default layout. For an input in oneDNN's layout MXNet makes
            # a temporary array, which is freed before the operator's thread has read it.
            F.reshape(copy, shape=(-2,)),
            gamma,
            beta,
            *running,
            op_type=operator_type(self.rank_sum, self.gamma.list_ctx()[0]),
            rank_sum=self.rank_sum.serial,
            axis=kernel["axis"],
            epsilon=kernel["eps"],
            scale=not kernel["fix_gamma"],
        )
        kernel["fix_gamma"] = False
        # MXNet's kernel updates running statistics in backward. Here it does so from two samples
        # that have the moments of all ranks.
        moved = F.BatchNorm(pair, gamma, beta, *running, **{**kernel, "axis": 0})
        gamma = F.slice_like(gamma, moved, axes=(0,))  # makes `moved` part of backward
        # With momentum 1 the main kernel leaves them alone.
        y = F.BatchNorm(x, gamma, beta, *running, name="fwd", **{**kernel, "momentum": 1})
        return F.relu(y) if self.fuse_relu else y

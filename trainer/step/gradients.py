"""Gradients of a step: averaged over ranks, clipped, and applied."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import dist
from ..dist.array_memory import dense_on_cpu, memory_of
from ..model.loss_scale import LossScale
from ..mxnet_internals import has_fresh_gradient, mark_gradient_as_fresh, scale, trained_parameters
from . import momentum, shared_gradients
from .timing import Mark, unmarked


def mean_gradients(trainer: gluon.Trainer) -> Dict[str, np.ndarray]:
    """The last step's gradients of the global mean loss, after clipping, by parameter name."""
    moved = trained_parameters(trainer)
    return {p.name: p.list_grad()[0].asnumpy() * scale(trainer) for p in moved}


def gradients(trainer: gluon.Trainer) -> List[mx.nd.NDArray]:
    """This rank's gradient arrays, in the trainer's order."""
    return [p.list_grad()[0] for p in trained_parameters(trainer)]


def zero_unused_gradients(trainer: gluon.Trainer) -> None:
    """Zero the gradients of parameters that this rank's forward did not use.

    Gluon would leave the last step's reduced gradient there and skip the update. Where ranks take
    different paths (layers dropped at random, branches on the data), the sum over ranks would be
    wrong and their weights would diverge.
    """
    for parameter in trained_parameters(trainer):
        data = parameter.list_data()[0]
        if not has_fresh_gradient(data):
            parameter.zero_grad()
            mark_gradient_as_fresh(data)


def reduce_and_update(
    trainer: gluon.Trainer,
    clip_norm: Optional[float],
    want_norm: bool,
    mark: Mark = unmarked,
    loss_scale: Optional[LossScale] = None,
) -> Optional[mx.nd.NDArray]:
    """Average gradients over ranks, clip them, update the parameters; asynchronous.

    With a ``loss_scale`` gradients are those of the scaled loss, and an update by such as are not
    finite is left out.

    Returns:
        The L2 norm, before clipping, of the gradient of the global batch's mean loss, float32
        (1,) on the device, where ``want_norm`` or ``clip_norm`` asks for it. Otherwise the update
        may read the sums from where they are, and mean_gradients does not find them.
    """
    zero_unused_gradients(trainer)
    whole = clip_norm is None and not want_norm and mark is unmarked and loss_scale is None
    if whole and _update_from_sums(trainer):
        return None
    mark("ranks")
    trainer.allreduce_grads()
    mark("allreduce")
    finite = None if loss_scale is None else loss_scale.remove(gradients(trainer))
    norm = None
    if want_norm or clip_norm is not None:
        arrays = gradients(trainer)
        # The arrays hold sums over ranks, which the update's scale divides by their number.
        norm = _norm(arrays) * scale(trainer)
        if clip_norm is not None:
            _rescale(arrays, mx.nd.minimum(clip_norm / (norm + 1e-12), 1.0))
    if loss_scale is None:
        trainer.update(1)
    else:
        loss_scale.update(trainer, finite)
    mark("update")
    return norm


def _update_from_sums(trainer: gluon.Trainer) -> bool:
    """Update by the sums that lie in the memory which ranks share; False if not possible."""
    optimizer = trainer.optimizer
    if not isinstance(optimizer, momentum.InOnePass):
        return False
    if not optimizer.handles(*(p.list_data()[0] for p in trained_parameters(trainer))):
        return False
    summed = shared_gradients.summed(trainer)
    if summed is None:
        return False
    with summed as gradients, optimizer.reading(gradients):
        trainer.update(1)
    return True


def _norm(arrays: List[mx.nd.NDArray]) -> mx.nd.NDArray:
    """The joint L2 norm of ``arrays``, which are alike on every rank, float32 (1,); collective."""
    if _on_host(arrays):
        mx.nd.waitall()  # NumPy must not read an array that the engine still works on
        own = math.sqrt(sum(float(np.vdot(view, view)) for view in map(memory_of, arrays)))
        # np.vdot has other kernels, and other last bits, on other processors: rank 0's norm counts.
        of_root = np.array([own if dist.is_root() else 0.0])
        return mx.nd.array(dist.allreduce_sum(of_root, "gradients.norm"))
    by_dtype: Dict[Any, List[mx.nd.NDArray]] = {}
    for array in arrays:  # a net cast to float16 keeps its batch norm in float32
        by_dtype.setdefault(array.dtype, []).append(array)
    squares = [mx.nd.multi_sum_sq(*alike, num_arrays=len(alike)) for alike in by_dtype.values()]
    return mx.nd.concat(*squares, dim=0).sum().sqrt()


@np.errstate(all="ignore")  # a net that diverges is reported by the metrics
def _rescale(arrays: List[mx.nd.NDArray], factor: mx.nd.NDArray) -> None:
    """Multiply ``arrays`` by ``factor``, float32 (1,), in place."""
    if not _on_host(arrays):
        for array in arrays:
            array *= factor.astype(array.dtype, copy=False)
    elif factor.asscalar() != 1:
        mx.nd.waitall()
        for view in map(memory_of, arrays):
            view *= view.dtype.type(factor.asscalar())


def _on_host(arrays: List[mx.nd.NDArray]) -> bool:
    """Whether NumPy can process ``arrays`` in place: on CPUs five times as fast as MXNet."""
    return all(dense_on_cpu(array, np.float32, np.float64) for array in arrays)

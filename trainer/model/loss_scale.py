"""Dynamic loss scaling, without which small gradients would be lost in float16.

docs/gpu.md ("float16") has the rule, of Micikevicius et al., "Mixed precision training", ICLR 2018.
An infinity on one rank is in the sum, so that all ranks decide alike without a word. All of it
stays on the device, and the host waits for none of it.
"""

from __future__ import annotations

from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence

import mxnet as mx
from mxnet import gluon

from .. import dist
from ..mxnet_internals import all_parameters, optimizer_arrays

START, GROWS_AFTER, LARGEST = 2.0**16, 2000, 2.0**24
_AT_ONCE = 200  # the most arrays that multi_all_finite takes on GPUs


class Reading(NamedTuple):
    """The scale between two steps."""

    scale: float
    good_steps: float  # since the scale was changed
    skipped_steps: float

    def figures(self) -> Dict[str, float]:
        """What is reported of it, by tag."""
        return {"optimizer/loss_scale": self.scale, "optimizer/skipped_steps": self.skipped_steps}


class LossScale:
    """The scale of one run, alike on all ranks.

    Args:
        state: of an earlier part of the run; None begins one.
    """

    def __init__(self, ctx: mx.Context, state: Optional[Sequence[float]] = None):
        start = Reading(*(state or (START, 0, 0)))
        self._scale, self._good, self._skipped = (mx.nd.array([one], ctx=ctx) for one in start)

    def applied(self, gradient: mx.nd.NDArray) -> mx.nd.NDArray:
        """What backward starts from, instead of ``gradient``, that of the loss.

        What is lost in float16, or overflows, does not depend on the number of ranks.
        """
        return gradient * (self._scale / dist.world_size()).astype(gradient.dtype)

    def remove(self, gradients: Sequence[mx.nd.NDArray]) -> mx.nd.NDArray:
        """Divide ``gradients``, summed over ranks, by the scale; whether all are finite, (1,)."""
        finite = all_finite(gradients)
        factor = dist.world_size() / self._scale
        for gradient in gradients:
            gradient *= factor.astype(gradient.dtype, copy=False)
        return finite

    def update(self, trainer: gluon.Trainer, finite: mx.nd.NDArray) -> None:
        """Update the parameters and the scale, if the gradients were ``finite``; else the scale."""
        arrays: List[mx.nd.NDArray] = []
        for index, parameter in enumerate(all_parameters(trainer)):
            if parameter.grad_req != "null":
                arrays += [parameter.list_data()[0], *optimizer_arrays(trainer, index)]
        before = [array.copy() for array in arrays]
        trainer.update(1)
        for array, old in zip(arrays, before):
            mx.nd.where(finite.broadcast_to(array.shape[:1]), array, old, out=array)
        good = (self._good + 1) * finite
        grows = good >= GROWS_AFTER
        factor = mx.nd.where(finite, 1 + grows, mx.nd.full((1,), 0.5, ctx=finite.context))
        self._scale = mx.nd.minimum(self._scale * factor, LARGEST)
        self._good = good * (1 - grows)
        self._skipped = self._skipped + 1 - finite

    def read(self) -> Reading:
        """Waits for the steps so far."""
        state = mx.nd.concat(self._scale, self._good, self._skipped, dim=0)
        return Reading(*state.asnumpy().tolist())


def all_finite(arrays: Iterable[mx.nd.NDArray]) -> mx.nd.NDArray:
    """1 if all numbers in ``arrays``, of which there is one at least, are finite, else 0; (1,)."""
    by_dtype: Dict[type, List[mx.nd.NDArray]] = {}
    for array in arrays:
        by_dtype.setdefault(array.dtype, []).append(array)
    found: Optional[mx.nd.NDArray] = None
    for alike in by_dtype.values():
        for some in (alike[i : i + _AT_ONCE] for i in range(0, len(alike), _AT_ONCE)):
            options = {"num_arrays": len(some), "init_output": found is None}
            found = mx.nd.multi_all_finite(*some, **options, out=found)
    assert found is not None
    return found

"""Allreduce of gradients over the network, in buckets that fill as backward goes on.

The gradients of a bucket lie side by side in one array, of which they are views: backward writes
into it, and Horovod sends it from where it is, without its fusion buffer. MXNet's engine takes the
views for one variable: the allreduce of a bucket begins when its last gradient is there, and the
update of its weights, and then the next forward's layers, when it ends. The host waits for none of
this. docs/scaling.md says how buckets are ordered (Li et al., "PyTorch Distributed", VLDB 2020,
section 3.2.3) and what is sent first (Jayarajan et al., MLSys 2019).

They are fixed and never fused (see ``dist.init``), so that the order of summation, and every bit of
the result, is the same in every run. Of the buckets that are ready at the same time Horovod sends
those first that it has sent first before; the first step, which sends one at a time in the order of
forward, settles that.
"""

from __future__ import annotations

import itertools
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import mxnet as mx
import numpy as np

from .. import dist
from ..dist import environment, half_sum
from ..errors import ConfigError
from ..mxnet_internals import clear_static_graphs, set_gradient

_FIRST = 2**20  # bytes of the first bucket, unless all are to be smaller
_ALIGNED = 64  # bytes: where a gradient begins in its bucket, for vectorized kernels
_HELD = 0.4  # of the bytes, at most: about what a third of a step, its forward, can hide

_fillings = itertools.count()  # of all trainers: buckets that travel at once must differ in name

Plan = List[List[int]]  # the gradients of each bucket, by their place among the trained ones


class Place(NamedTuple):
    """Where the gradient of a parameter is."""

    bucket: int = 0
    flat: Optional[mx.nd.NDArray] = None  # of the bucket; None before the first step
    start: int = 0


class Buckets:
    """What ``trainer.allreduce_grads`` calls: replaces every gradient by its sum over ranks.

    The first call moves the gradients into buckets, so code that reads gradients must call
    ``parameter.grad()`` in every step.
    """

    def __init__(
        self,
        parameters: Sequence[mx.gluon.Parameter],
        forward: Sequence[mx.gluon.Parameter],
        megabytes: float,
        half: bool = False,
    ):
        """Of the trainer of ``parameters``, in the same order on every rank.

        Args:
            forward: the order in which forward uses them, as far as is known; rank 0's counts.
            megabytes: a bucket ends with the parameter that makes it as large as this.
            half: send float32 and float64 as float16.
        """
        self._parameters = list(parameters)
        places = {id(parameter): place for place, parameter in enumerate(forward)}
        self._forward = [places.get(id(parameter), len(places)) for parameter in parameters]
        self._bytes, self.half = megabytes * 2**20, half
        self._buckets: List[_Bucket] = []
        self._held: Set[int] = set()  # numbers of buckets
        self._places: Dict[int, Place] = {}

    def __getstate__(self) -> Dict[str, Any]:
        """Without the buckets: views of one array do not survive pickling as such."""
        return {**vars(self), "_buckets": [], "_places": {}}

    def __call__(self) -> None:
        """Enqueue the allreduces; collective. The first call raises as :meth:`planned` does."""
        trained = [p for p in self._parameters if p.grad_req != "null"]
        held = {id(gradient) for bucket in self._buckets for gradient in bucket.gradients}
        if held != {id(parameter.list_grad()[0]) for parameter in trained}:
            self._fill()
            for bucket in reversed(self._buckets):
                bucket.reduce()
                bucket.flat.wait_to_read()
        else:
            for number, bucket in enumerate(self._buckets):
                if number in self._held:
                    _wait_for(bucket.flat, self._buckets[-1].flat)
                bucket.reduce()

    def place_of(self, index: int) -> Place:
        """That of the trainer's parameter of that index."""
        return self._places.get(index, Place())

    def planned(self) -> List[List[mx.gluon.Parameter]]:
        """The trained parameters of each bucket, the same on every rank; collective.

        Within a bucket those are neighbours that have the same factors of rate and decay, so that
        a kernel can update all of them (momentum.py). Raises ConfigError where the ranks train
        different parameters.
        """
        indices = [i for i, p in enumerate(self._parameters) if p.grad_req != "null"]
        trained = [self._parameters[index] for index in indices]
        gradients = [parameter.list_grad()[0] for parameter in trained]
        own = [(i, g.shape, np.dtype(g.dtype).str) for i, g in zip(indices, gradients)]
        order = sorted(range(len(trained)), key=lambda place: -self._forward[indices[place]])
        factors = [(parameter.lr_mult, parameter.wd_mult) for parameter in trained]
        ranks = dist.gather_objects((own, order, factors, environment.where()))
        for theirs, *_, where in ranks:
            if theirs != ranks[0][0]:
                pairs = itertools.zip_longest(theirs, ranks[0][0])
                one, other = next((one, other) for one, other in pairs if one != other)
                raise ConfigError(
                    f"{where} trains other parameters than {ranks[0][3]}, first (number, shape, "
                    f"dtype) {one} in place of {other}; make and freeze the same layers on every "
                    "rank"
                )
        sizes = [gradient.size * np.dtype(gradient.dtype).itemsize for gradient in gradients]
        buckets = plan(ranks[0][1], sizes, [dtype for *_, dtype in own], self._bytes)
        factors = ranks[0][2]
        return [[trained[i] for i in sorted(bucket, key=factors.__getitem__)] for bucket in buckets]

    def _fill(self) -> None:
        half = half_sum.everywhere() if self.half else None
        name = f"gradients.{dist.broadcast_object(next(_fillings))}"
        self._buckets = [
            _Bucket(parameters, f"{name}.{number}", half)
            for number, parameters in enumerate(self.planned())
        ]
        self._held = held([bucket.bytes for bucket in self._buckets])
        indices = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        self._places = {
            indices[id(parameter)]: Place(number, bucket.flat, start)
            for number, bucket in enumerate(self._buckets)
            for parameter, start in zip(bucket.parameters, bucket.starts)
        }
        clear_static_graphs(self._parameters)


def plan(order: Sequence[int], sizes: Sequence[int], dtypes: Sequence[str], limit: float) -> Plan:
    """Divide gradients, given by bytes and dtype, into buckets of one dtype, in ``order``.

    A bucket ends with the gradient that brings it to ``limit`` bytes, the first to a megabyte at
    most.
    """
    buckets: Plan = []
    filling: Dict[str, List[int]] = {}  # by dtype: those that are not full yet
    for index in order:
        if dtypes[index] not in filling:
            filling[dtypes[index]] = []
            buckets.append(filling[dtypes[index]])
        bucket = filling[dtypes[index]]
        bucket.append(index)
        full = min(limit, _FIRST) if bucket is buckets[0] else limit
        if sum(sizes[one] for one in bucket) >= full:
            del filling[dtypes[index]]
    return buckets


def side_by_side(
    arrays: Sequence[mx.nd.NDArray],
) -> Tuple[mx.nd.NDArray, List[int], List[mx.nd.NDArray]]:
    """A flat array with the values of arrays of one dtype and device, and where each begins in it;
    its views, which can take the arrays' places.
    """
    unit = max(1, _ALIGNED // np.dtype(arrays[0].dtype).itemsize)
    starts = np.cumsum([0, *(-(-array.size // unit) * unit for array in arrays)]).tolist()
    flat = mx.nd.zeros(starts[-1], ctx=arrays[0].context, dtype=arrays[0].dtype)
    views = []
    for array, start in zip(arrays, starts):
        views.append(flat[start : start + array.size].reshape(array.shape))
        views[-1][:] = array
    return flat, starts[:-1], views


def held(sizes: Sequence[int]) -> Set[int]:
    """The buckets, given by their bytes in the order of backward, that are sent after backward.

    Every second one from the last layers on, so that the wire is busy during backward, and never
    the last, which holds the first layers.
    """
    chosen: Set[int] = set()
    for number in range(1, len(sizes) - 1, 2):
        if sum(sizes[one] for one in (*chosen, number)) > _HELD * sum(sizes):
            break
        chosen.add(number)
    return chosen


def _wait_for(array: mx.nd.NDArray, other: mx.nd.NDArray) -> None:
    """Have the engine's further work on a flat ``array`` wait for the work on ``other``."""
    first = array[:1]
    mx.nd.reshape_like(first, other[:1], out=first)  # onto itself; `other` is for the order alone


class _Bucket:
    """Gradients of one dtype and device, side by side in the array ``flat``."""

    def __init__(self, parameters: Sequence[mx.gluon.Parameter], name: str, half: Optional[bool]):
        self.parameters = parameters
        old = [parameter.list_grad()[0] for parameter in parameters]
        self.flat, self.starts, self.gradients = side_by_side(old)
        self.bytes = self.flat.size * np.dtype(old[0].dtype).itemsize
        for parameter, view in zip(parameters, self.gradients):
            set_gradient(parameter, view)
        # Enqueues the allreduce of its gradients.
        self.reduce = half_sum.summing(self.flat, name, half)

"""SGD with momentum, plain or Nesterov's, faster than MXNet's for float32 arrays on the CPU.

MXNet's kernels are not vectorized. The one in native/momentum.cc is as fast as memory allows, and
reads the sums of ranks that share memory from where they are. It gives the same bits as MXNet's,
which do the rest: on GPUs, other dtypes, with ``clip_gradient``, without momentum, without
a compiler, and where waiting for backward before the update would cost more than it gains.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import sys
import types
from typing import Any, Callable, ClassVar, Iterator, Mapping, NamedTuple, Optional

import mxnet as mx
import numpy as np

from ..dist import environment
from ..dist.array_memory import address_of, dense_on_cpu, take_memory
from ..mxnet_internals import clear_static_graphs, set_gradient
from ..native import compile
from .buckets import Place, side_by_side

_AT_ONCE = 60  # arrays: the most that MXNet's kernel takes
_LARGE = 10_000  # elements; for smaller arrays the overhead of a call dominates

Addresses = Mapping[int, int]  # of float32 gradients, by a parameter's index


def library() -> Optional[ctypes.CDLL]:
    """The compiled kernel; None where it cannot be compiled."""
    return compile.load(
        "momentum", "weights are updated by MXNet's kernels", environment.local_rank() == 0
    )


def _anywhere(index: int) -> Place:
    return Place()


class InOnePass(mx.optimizer.Optimizer):
    """Replaces the update of an optimizer of MXNet's."""

    nesterov: ClassVar[bool]
    momentum: float
    aggregate_num: int
    may_wait = False  # for backward: set where something has waited for it anyway
    _gradients: Addresses = types.MappingProxyType({})

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self._at_once = max(1, self.aggregate_num)  # large arrays on the CPU in a call of MXNet's
        self.aggregate_num = sys.maxsize  # in an update: Gluon then gives lists, of all at once
        # By a parameter's index: those of another bucket get their gradients at another time.
        self.place_of: Callable[[int], Place] = _anywhere

    @contextlib.contextmanager
    def reading(self, gradients: Addresses) -> Iterator[None]:
        """Update by ``gradients`` instead of by those passed."""
        self._gradients = gradients
        try:
            yield
        finally:
            del self._gradients

    def handles(self, *arrays: Any) -> bool:
        """Whether the C++ kernel updates ``arrays``: weights, gradients, momenta."""
        wanted = self.may_wait and self.momentum > 0 and not self.clip_gradient
        on_cpu = wanted and all(dense_on_cpu(array, np.float32) for array in arrays)
        return on_cpu and library() is not None

    def update_multi_precision(self, index: Any, weight: Any, grad: Any, state: Any) -> None:
        """Update the parameters of a list."""
        if self._gradients:  # whoever gives them has asked handles() about the weights
            assert all(array.dtype == np.float32 for array in (*weight, *state)), "sums are float32"
        if self._gradients or self.handles(*weight, *grad, *state):
            self._update(index, weight, grad, state)
        else:
            self._update_by_mxnet(list(zip(index, weight, grad, state)))

    def _update_by_mxnet(self, parameters: list[tuple[Any, ...]]) -> None:
        for parameter in parameters:
            super().update_multi_precision(*parameter)

    def _options(self, indices: list[int]) -> dict[str, float]:
        """Of MXNet's kernels, for parameters that have the same, and now count as updated."""
        self._update_count(indices)
        return {
            "lr": self._get_lr(indices[0]),
            "wd": self._get_wd(indices[0]),
            "momentum": self.momentum,
            "rescale_grad": self.rescale_grad,
            "clip_gradient": self.clip_gradient or -1.0,
        }

    def _update(self, indices: Any, weights: Any, gradients: Any, momenta: Any) -> None:
        self._update_count(indices)
        rates = np.array(self._get_lrs(indices), np.float32)
        decays = np.array(self._get_wds(indices), np.float32)
        mx.nd.waitall()  # for backward, and for all that reads the weights
        places = [
            self._gradients.get(index) or address_of(gradient)
            for index, gradient in zip(indices, gradients)
        ]
        numbers = (
            np.array([array.size for array in weights], np.int64),
            np.array([address_of(array) for array in weights], np.uintp),
            np.array([address_of(array) for array in momenta], np.uintp),
            np.array(places, np.uintp),
            rates,
            decays,
        )
        kernel = library()
        assert kernel is not None
        kernel.update(
            len(indices),
            *(ctypes.c_void_p(array.ctypes.data) for array in numbers),
            ctypes.c_float(self.momentum),
            ctypes.c_float(self.rescale_grad),
            self.nesterov,
        )


class SGD(InOnePass, mx.optimizer.SGD):
    """MXNet's SGD, which by itself uses its single-array kernel for large arrays on the CPU.

    MXNet's own choice, the multi-array kernel, interleaves the elements of four arrays, which takes
    longer. Both give the same bits.
    """

    nesterov = False

    def _update_by_mxnet(self, parameters: list[tuple[Any, ...]]) -> None:
        others: dict[int, list[tuple[Any, ...]]] = {}  # by bucket
        for one in parameters:
            large = self.momentum > 0 and one[1].size >= _LARGE
            if large and all(dense_on_cpu(array, np.float32) for array in one[1:]):
                index, weight, grad, momentum = one
                options = self._options([index])
                mx.nd.sgd_mom_update(weight, grad, momentum, out=weight, **options)
            else:
                others.setdefault(self.place_of(one[0]).bucket, []).append(one)
        for _, bucket in sorted(others.items()):
            large = any(one[1].size >= _LARGE and one[1].context == mx.cpu() for one in bucket)
            at_once = self._at_once if large else _AT_ONCE
            for start in range(0, len(bucket), at_once):
                few = bucket[start : start + at_once]
                mx.optimizer.SGD.update_multi_precision(self, *map(list, zip(*few)))


class _Joined(NamedTuple):
    """Parameters that one call updates: flat arrays of which theirs are parts."""

    indices: list[int]
    weights: mx.nd.NDArray
    gradients: mx.nd.NDArray
    momenta: mx.nd.NDArray


class _Plan(NamedTuple):
    """How parameters of one dtype, which MXNet hands over together, are updated."""

    known: list[tuple[Any, ...]]  # the parameters
    joined: list[_Joined]
    alone: set[int]  # indices of those that cannot be joined


class NAG(InOnePass, mx.optimizer.NAG):
    """MXNet's SGD with Nesterov's momentum.

    On GPUs, where the host would make a call for each parameter, weights and momenta move side by
    side, as gradients lie in their bucket: one call for all of a bucket with the same factors.
    """

    nesterov = True
    joined_on: ClassVar[str] = "gpu"  # of MXNet's kinds of devices

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self._plans: dict[Any, _Plan] = {}  # by the weights' dtype

    def __getstate__(self) -> dict[str, Any]:
        """Views of one array do not survive pickling as such."""
        return {**super().__getstate__(), "_plans": {}}

    def _update_by_mxnet(self, parameters: list[tuple[Any, ...]]) -> None:
        if parameters[0][1].context.device_type != self.joined_on:
            super()._update_by_mxnet(parameters)
            return
        known = [(*one, *self._factors(one[0])) for one in parameters]
        dtype = parameters[0][1].dtype
        plan = self._plans.get(dtype)
        if plan is None or not _identical(known, plan.known):
            plan = _Plan(known, [], set())
            self._join(parameters, plan)
            self._plans[dtype] = plan
        super()._update_by_mxnet([one for one in parameters if one[0] in plan.alone])
        for indices, weights, gradients, momenta in plan.joined:
            options = self._options(indices)
            mx.nd.nag_mom_update(weights, gradients, momenta, out=weights, **options)

    def _factors(self, index: int) -> tuple[float, ...]:
        parameter = self.param_dict.get(index)
        return () if parameter is None else (parameter.lr_mult, parameter.wd_mult)

    def _join(self, parameters: list[tuple[Any, ...]], plan: _Plan) -> None:
        """Move weights and momenta, and gradients that are in no bucket, side by side."""
        groups: dict[Any, list[tuple[Any, ...]]] = {}
        for one in parameters:
            index, *arrays = one
            factors, place = self._factors(index), self.place_of(index)
            simple = all(isinstance(a, mx.nd.NDArray) and a.stype == "default" for a in arrays)
            if factors and simple and len({array.dtype for array in arrays}) == 1:
                groups.setdefault((place.bucket, arrays[0].dtype, *factors), []).append(one)
            else:
                plan.alone.add(index)
        for group in groups.values():
            group.sort(key=lambda one: self.place_of(one[0]).start)
            self._join_group(plan, group)

    def _join_group(self, plan: _Plan, group: list[tuple[Any, ...]]) -> None:
        indices, weights, gradients, momenta = map(list, zip(*group))
        places = list(map(self.place_of, indices))
        flat_weights, starts, views = side_by_side(weights)
        first = places[0]
        if first.flat is None:
            flat_gradients = _moved(gradients)
        elif [place.start - first.start for place in places] == starts:
            flat_gradients = first.flat[first.start : first.start + flat_weights.size]
        else:  # others lie between them: factors that have changed since the bucket was filled
            plan.alone.update(indices)
            return
        for weight, view in zip(weights, views):
            take_memory(weight, view)
        parameters = [self.param_dict[index] for index in indices]
        for parameter, gradient in zip(parameters, gradients):
            set_gradient(parameter, gradient)
        clear_static_graphs(parameters)
        plan.joined.append(_Joined(indices, flat_weights, flat_gradients, _moved(momenta)))


def _moved(arrays: list[mx.nd.NDArray]) -> mx.nd.NDArray:
    """Move arrays side by side; the array of which they are now parts."""
    flat, _, views = side_by_side(arrays)
    for array, view in zip(arrays, views):
        take_memory(array, view)
    return flat


def _identical(some: list[tuple[Any, ...]], others: list[tuple[Any, ...]]) -> bool:
    """Whether the same arrays, and equal numbers, stand in both."""
    return len(some) == len(others) and all(
        a is b or (isinstance(a, (int, float)) and a == b)
        for one, other in zip(some, others)
        for a, b in itertools.zip_longest(one, other)
    )

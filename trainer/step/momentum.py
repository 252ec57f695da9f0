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
from typing import Any, Callable, ClassVar, Iterator, List, Mapping, Optional, Tuple

import mxnet as mx
import numpy as np

from ..dist import environment
from ..dist.array_memory import address_of, dense_on_cpu
from ..native import compile

_AT_ONCE = 60  # arrays: the most that MXNet's kernel takes
_LARGE = 10_000  # elements; for smaller arrays the overhead of a call dominates

Addresses = Mapping[int, int]  # of float32 gradients, by a parameter's index


def library() -> Optional[ctypes.CDLL]:
    """The compiled kernel; None where it cannot be compiled."""
    return compile.load(
        "momentum", "weights are updated by MXNet's kernels", environment.local_rank() == 0
    )


def _one_bucket(index: int) -> int:
    return 0


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
        self.bucket_of: Callable[[int], int] = _one_bucket

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
            self._update(*map(list, (index, weight, grad, state)))
        else:
            self._update_by_mxnet(list(zip(index, weight, grad, state)))

    def _update_by_mxnet(self, parameters: List[Tuple[Any, ...]]) -> None:
        for parameter in parameters:
            super().update_multi_precision(*parameter)

    def _update(
        self,
        indices: List[int],
        weights: List[mx.nd.NDArray],
        gradients: List[mx.nd.NDArray],
        momenta: List[mx.nd.NDArray],
    ) -> None:
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

    def _update_by_mxnet(self, parameters: List[Tuple[Any, ...]]) -> None:
        others: List[Tuple[Any, ...]] = []
        for one in parameters:
            large = self.momentum > 0 and one[1].size >= _LARGE
            if large and all(dense_on_cpu(array, np.float32) for array in one[1:]):
                self._update_alone(*one)
            else:
                others.append(one)
        for _, alike in itertools.groupby(
            sorted(others, key=lambda one: self.bucket_of(one[0])),
            key=lambda one: self.bucket_of(one[0]),
        ):
            bucket = list(alike)
            large = any(one[1].size >= _LARGE and one[1].context == mx.cpu() for one in bucket)
            at_once = self._at_once if large else _AT_ONCE
            for start in range(0, len(bucket), at_once):
                few = bucket[start : start + at_once]
                mx.optimizer.SGD.update_multi_precision(self, *map(list, zip(*few)))

    def _update_alone(self, index: int, weight: Any, grad: Any, momentum: Any) -> None:
        self._update_count(index)
        mx.nd.sgd_mom_update(
            weight,
            grad,
            momentum,
            out=weight,
            lr=self._get_lr(index),
            wd=self._get_wd(index),
            momentum=self.momentum,
            rescale_grad=self.rescale_grad,
            clip_gradient=self.clip_gradient or -1.0,
        )


class NAG(InOnePass, mx.optimizer.NAG):
    """MXNet's SGD with Nesterov's momentum."""

    nesterov = True

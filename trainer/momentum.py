"""SGD with momentum, plain or Nesterov's, in C++ for float32 arrays on the CPU.

MXNet's kernels are not vectorized; this one (native/momentum.cc) reads and writes each number once,
as fast as memory allows. It gives the same bits as MXNet's, which compute everything else: on GPUs,
other dtypes, with ``clip_gradient``, without momentum, and without a compiler.

It can also add up the gradients of several ranks that share memory while it reads them.
"""

from __future__ import annotations

import contextlib
import ctypes
import types
from typing import Any, ClassVar, Iterator, List, Mapping, Optional, Sequence

import mxnet as mx
import numpy as np

from . import compiled
from .placement import address_of, dense_on_cpu

Addresses = Mapping[int, Sequence[int]]  # of all ranks' gradients, by a parameter's index


def library() -> Optional[ctypes.CDLL]:
    """The compiled kernel; None where it cannot be compiled."""
    return compiled.load("momentum", "weights are updated by MXNet's kernels")


class InOnePass(mx.optimizer.Optimizer):
    """Replaces the update of an optimizer of MXNet's."""

    nesterov: ClassVar[bool]
    momentum: float
    _gradients: Addresses = types.MappingProxyType({})

    @contextlib.contextmanager
    def adding(self, gradients: Addresses) -> Iterator[None]:
        """Update by the sums of ``gradients``, in their order, instead of by those passed."""
        self._gradients = gradients
        try:
            yield
        finally:
            self._gradients = types.MappingProxyType({})

    def handles(self, *arrays: Any) -> bool:
        """Whether the C++ kernel updates ``arrays``: weights, gradients, momenta."""
        wanted = self.momentum > 0 and not self.clip_gradient
        on_cpu = wanted and all(dense_on_cpu(array, np.float32) for array in arrays)
        return on_cpu and library() is not None

    def update_multi_precision(self, index: Any, weight: Any, grad: Any, state: Any) -> None:
        """Update one parameter, or several, given lists."""
        several = isinstance(index, (list, tuple))
        lists = (index, weight, grad, state) if several else ([index], [weight], [grad], [state])
        if self.handles(*lists[1], *lists[2], *lists[3]):
            self._update(*map(list, lists))
        else:
            assert not self._gradients, "their sums would be missing"
            super().update_multi_precision(index, weight, grad, state)

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
        rows = [
            self._gradients.get(index) or [address_of(gradient)]
            for index, gradient in zip(indices, gradients)
        ]
        numbers = (
            np.array([array.size for array in weights], np.int64),
            np.array([address_of(array) for array in weights], np.uintp),
            np.array([address_of(array) for array in momenta], np.uintp),
            np.array(rows, np.uintp),
            rates,
            decays,
        )
        kernel = library()
        assert kernel is not None
        kernel.update(
            len(indices),
            len(rows[0]),
            *(ctypes.c_void_p(array.ctypes.data) for array in numbers),
            ctypes.c_float(self.momentum),
            ctypes.c_float(self.rescale_grad),
            self.nesterov,
        )


class SGD(InOnePass, mx.optimizer.SGD):
    """MXNet's SGD."""

    nesterov = False


class NAG(InOnePass, mx.optimizer.NAG):
    """MXNet's SGD with Nesterov's momentum."""

    nesterov = True

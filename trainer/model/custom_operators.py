"""A net's own ``mx.operator.CustomOp`` and ``autograd.Function``, kept apart from oneDNN's layouts.

On CPUs MXNet 1.9.1 copies an array that a convolution has made into its own layout for them, and
frees the copy before their thread has read it: then they compute with whatever lies there. Here
they get arrays in MXNet's layout, and so do, with the gradients of what they give, their backwards.
"""

from __future__ import annotations

from functools import partial, partialmethod
from typing import Any, Callable

import mxnet as mx
import numpy as np
from mxnet import autograd

from ..dist.array_memory import address_of, dense_on_cpu


def _apart(array: Any) -> Any:
    """A copy in MXNet's layout, as is its gradient: slice_axis knows no other, nor works in place.

    Of all in a list or a symbol; float32 arrays on CPUs alone.
    """
    if isinstance(array, (list, tuple)):
        return type(array)(map(_apart, array))
    if isinstance(array, mx.sym.Symbol):
        each = [mx.sym.slice_axis(one, axis=0, begin=0, end=None) for one in array]
        return each[0] if len(each) == 1 else mx.sym.Group(each)
    apart = isinstance(array, mx.nd.NDArray) and dense_on_cpu(array, np.float32) and array.shape
    return mx.nd.slice_axis(array, axis=0, begin=0, end=None) if apart else array


def _reordered(array: Any) -> Any:
    """An input, which is not copied if it may be a state that the operator changes."""
    if isinstance(array, mx.sym.Symbol) and array.get_children() is not None:
        return _apart(array)
    if isinstance(array, mx.nd.NDArray) and dense_on_cpu(array, np.float32):
        array.wait_to_read()
        address_of(array)  # puts it into MXNet's layout
    return array


def _custom(plain: Callable[..., Any], *inputs: Any, **arguments: Any) -> Any:
    if arguments.get("op_type", "").startswith("sync_batch_norm_"):  # whose layer sees to it
        return plain(*inputs, **arguments)
    arguments = {name: _reordered(argument) for name, argument in arguments.items()}
    found = plain(*map(_reordered, inputs), **arguments)
    return found if "out" in arguments else _apart(found)


def _call(function: autograd.Function, plain: Callable[..., Any], *inputs: Any) -> Any:
    found = plain(function, *inputs)
    return _apart(found) if autograd.is_recording() else found


# For good: it changes nothing but what would be garbage, and graphs are traced at any time.
for _module in (mx.nd, mx.sym):  # a hybrid_forward's F
    _module.Custom = partial(_custom, _module.Custom)
autograd.Function.__call__ = partialmethod(_call, autograd.Function.__call__)

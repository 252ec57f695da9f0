"""Mixed precision: convolutions and dense layers multiply in bfloat16 or float16 during training.

Within :func:`computing_in` these layers round their input and weights to it and return float32, in
forward and backward. Weights, norms, activations, loss, optimizer and the allreduce stay float32;
float16 needs a loss scale besides (loss_scale.py). Individual layers are patched, temporarily,
because ``mxnet.contrib.amp`` replaces MXNet's operators for the whole process, irreversibly.
"""

from __future__ import annotations

import contextlib
from functools import partial
from types import SimpleNamespace
from typing import Any, Callable, Iterator, List, Optional

import mxnet as mx
import numpy as np
from mxnet import gluon
from mxnet.contrib.amp.amp import bfloat16
from mxnet.gluon import nn

from ..batch_norm import clear_cached_graphs
from ..errors import ConfigError, first_line
from ..mxnet_internals import blocks

Forward = Callable[..., Any]

_DEVICES = {"bfloat16": "cpu", "float16": "gpu"}  # the only ones with kernels for it
_LOW = {"bfloat16": bfloat16, "float16": "float16"}  # as amp_cast takes it
_FORWARD = "hybrid_forward"
_LAYERS = (nn.Conv1D, nn.Conv2D, nn.Conv3D, nn.Dense)
_OWN_FORWARDS = {layer.hybrid_forward for layer in _LAYERS}


def check(net: gluon.Block, precision: str, ctx: mx.Context) -> None:
    """Refuse a precision, float32, bfloat16 or float16, in which ``net`` cannot train on ``ctx``.

    Raises:
        ConfigError: MXNet cannot compute in it there, or the net has no layer that would use it.
    """
    if precision == "float32":
        return
    given = f"train.precision is {precision}"
    device = _DEVICES[precision]
    if ctx.device_type != device:
        raise ConfigError(
            f"{given}, which MXNet has on {device.upper()}s alone, not on {ctx}; set "
            "train.precision=float32"
        )
    if not _layers(net):
        raise ConfigError(
            f"{given}, but the net has no float32 layer that would use it (Gluon's own Conv1D, "
            "Conv2D, Conv3D, Dense); set train.precision=float32"
        )
    one = mx.nd.ones((1, 1), ctx=ctx)
    try:
        dense = partial(_product, precision, mx.nd, mx.nd.FullyConnected)
        dense(one, one, num_hidden=1, no_bias=True).wait_to_read()
    except mx.MXNetError as error:
        why = (
            f"in which {ctx} cannot multiply ({first_line(error)})"
            if device == "gpu"
            else "which takes a processor with AVX-512, and pays where `lscpu` shows avx512_bf16"
        )
        raise ConfigError(f"{given}, {why}; set train.precision=float32") from error


@contextlib.contextmanager
def computing_in(net: gluon.Block, precision: str) -> Iterator[None]:
    """Within it ``net`` multiplies in ``precision``, as :func:`check` takes it; may be nested.

    It affects Gluon's Conv1D, Conv2D, Conv3D and Dense; subclasses with their own forward,
    and operators outside of layers, do not change.
    """
    layers = _layers(net)
    before = [vars(layer).get(_FORWARD) for layer in layers]
    low = precision != "float32"
    _set_forwards(net, layers, [_in(precision, layer) if low else None for layer in layers])
    try:
        yield
    finally:
        _set_forwards(net, layers, before)


def _layers(net: gluon.Block) -> List[Any]:
    """The layers of ``net`` that can multiply in less than float32, each once."""
    layers: List[Any] = [block for block in blocks(net) if isinstance(block, _LAYERS)]
    own = (layer for layer in layers if type(layer).hybrid_forward in _OWN_FORWARDS)
    return [layer for layer in own if np.dtype(layer.weight.dtype) == np.float32]


def _set_forwards(net: gluon.Block, layers: List[Any], forwards: List[Optional[Forward]]) -> None:
    """Override the forward of each layer; None restores that of its class."""
    if [vars(layer).get(_FORWARD) for layer in layers] == forwards:
        return
    for layer, forward in zip(layers, forwards):
        vars(layer).pop(_FORWARD, None)
        if forward is not None:
            setattr(layer, _FORWARD, forward)
    clear_cached_graphs(net)


def _in(precision: str, layer: Any) -> Forward:
    """The layer's forward with its operator in ``precision`` and its activation in float32."""
    forward = getattr(type(layer), _FORWARD)

    def of_operators(F: Any, *inputs: Any, **parameters: Any) -> Any:
        operators = SimpleNamespace(
            Convolution=partial(_product, precision, F, F.Convolution),
            FullyConnected=partial(_product, precision, F, F.FullyConnected),
        )
        return forward(layer, operators, *inputs, **parameters)

    return of_operators


def _product(precision: str, F: Any, operator: Any, *operands: Any, **options: Any) -> Any:
    """``operator`` on float32 operands (or None), computed in ``precision`` -> float32."""
    # The backward of MXNet's amp_cast ignores grad_req="add"; that of identity does not.
    copies = (None if operand is None else F.identity(operand) for operand in operands)
    low = (copy if copy is None else F.amp_cast(copy, dtype=_LOW[precision]) for copy in copies)
    return F.amp_cast(operator(*low, **options), dtype="float32")

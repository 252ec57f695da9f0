"""Mixed precision: convolutions and dense layers multiply in bfloat16 during training.

Within :func:`computing_in` these layers round their input and weights to bfloat16 and return
float32, in forward and backward. Weights, norms, activations, loss, optimizer and the allreduce
stay float32. Individual layers are patched, temporarily, because ``mxnet.contrib.amp`` replaces
MXNet's operators for the whole process, irreversibly. Also, its ``amp_cast`` cannot accumulate a
gradient (see :func:`_rounded`).
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
from ..errors import ConfigError

Forward = Callable[..., Any]

_FORWARD = "hybrid_forward"
_LAYERS = (nn.Conv1D, nn.Conv2D, nn.Conv3D, nn.Dense)
_OWN_FORWARDS = {layer.hybrid_forward for layer in _LAYERS}


def check(net: gluon.Block, precision: str, ctx: mx.Context) -> None:
    """Refuse a ``precision``, float32 or bfloat16, in which ``net`` cannot be trained on ``ctx``.

    Raises:
        ConfigError: MXNet cannot compute in it there, or the net has no layer that would use it.
    """
    if precision == "float32":
        return
    given = f"train.precision is {precision}"
    if ctx.device_type != "cpu":
        raise ConfigError(
            f"{given}, which MXNet has on CPUs alone, not on {ctx}; set train.precision=float32"
        )
    if not _layers(net):
        raise ConfigError(
            f"{given}, but the net has no float32 layer that would use it (Gluon's own Conv1D, "
            "Conv2D, Conv3D, Dense); set train.precision=float32"
        )
    one = mx.nd.ones((1, 1), ctx=ctx)
    try:
        _product(mx.nd, mx.nd.FullyConnected, one, one, num_hidden=1, no_bias=True).wait_to_read()
    except mx.MXNetError as error:
        raise ConfigError(
            f"{given}, which takes a processor with AVX-512, and pays where `lscpu` shows "
            "avx512_bf16; set train.precision=float32"
        ) from error


@contextlib.contextmanager
def computing_in(net: gluon.Block, precision: str) -> Iterator[None]:
    """Within it ``net`` multiplies in ``precision``, float32 or bfloat16; may be nested.

    bfloat16 affects Gluon's Conv1D, Conv2D, Conv3D and Dense; subclasses with their own forward,
    and operators outside of layers, do not change.
    """
    layers = _layers(net)
    before = [vars(layer).get(_FORWARD) for layer in layers]
    low = precision == "bfloat16"
    _set_forwards(net, layers, [_in_bfloat16(layer) if low else None for layer in layers])
    try:
        yield
    finally:
        _set_forwards(net, layers, before)


def _layers(net: gluon.Block) -> List[Any]:
    """The layers of ``net`` that can multiply in bfloat16, each once."""
    found = {}

    def collect(block: gluon.Block) -> None:
        gluons_own = isinstance(block, _LAYERS) and type(block).hybrid_forward in _OWN_FORWARDS
        if gluons_own and np.dtype(block.weight.dtype) == np.float32:
            found[id(block)] = block

    net.apply(collect)
    return list(found.values())


def _set_forwards(net: gluon.Block, layers: List[Any], forwards: List[Optional[Forward]]) -> None:
    """Override the forward of each layer; None restores that of its class."""
    if [vars(layer).get(_FORWARD) for layer in layers] == forwards:
        return
    for layer, forward in zip(layers, forwards):
        vars(layer).pop(_FORWARD, None)
        if forward is not None:
            setattr(layer, _FORWARD, forward)
    clear_cached_graphs(net)


def _in_bfloat16(layer: Any) -> Forward:
    """The layer's forward with its operator in bfloat16 and its activation in float32."""
    forward = getattr(type(layer), _FORWARD)

    def of_operators(F: Any, *inputs: Any, **parameters: Any) -> Any:
        operators = SimpleNamespace(
            Convolution=partial(_product, F, F.Convolution),
            FullyConnected=partial(_product, F, F.FullyConnected),
        )
        return forward(layer, operators, *inputs, **parameters)

    return of_operators


def _product(F: Any, operator: Any, *operands: Any, **options: Any) -> Any:
    """``operator`` on float32 operands (or None), computed in bfloat16 -> float32."""
    low = (None if operand is None else _rounded(F, operand) for operand in operands)
    return F.amp_cast(operator(*low, **options), dtype="float32")


def _rounded(F: Any, operand: Any) -> Any:
    # The backward of MXNet's amp_cast ignores grad_req="add"; that of identity does not.
    return F.amp_cast(F.identity(operand), dtype=bfloat16)

"""A table of a net's layers with output shapes, parameters and FLOPs."""

from __future__ import annotations

from typing import Any, List, NamedTuple, Sequence, Set, Tuple

import mxnet as mx
import numpy as np
from mxnet.gluon import Block, nn

from ..console import aligned
from ..mxnet_internals import blocks, children

_MULTIPLYING = nn.Conv1D, nn.Conv2D, nn.Conv3D, nn.Dense  # those whose FLOPs are counted


class Row(NamedTuple):
    """A top-level layer of the net."""

    name: str
    kind: str
    output: Tuple[int, ...]  # shape, batch first
    parameters: int
    flops: int  # multiplications and additions of convolutions and dense layers in a forward


def summarize(net: Block, data: mx.nd.NDArray) -> List[Row]:
    """The layers of ``net`` on an input like ``data``, in the order they run.

    The rows are the children of ``net`` in call order; it must be initialised. A forward in
    inference mode settles deferred shapes. Layers inside a hybridized block are not seen.
    """
    rows: List[Row] = []
    flops: List[int] = []
    counted: Set[str] = set()  # names of parameters: a layer may be called twice or share them

    def count(layer: Block, inputs: Any, output: Any) -> None:
        # Of multiply-accumulates; a hybridized block has symbols.
        if isinstance(layer, _MULTIPLYING) and isinstance(output, mx.nd.NDArray):
            flops.append(2 * int(np.prod(layer.weight.shape[1:])) * output.size)

    def close(layer: Block, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (list, tuple)) else output
        if not isinstance(first, mx.nd.NDArray):
            return
        own = {name: p for name, p in layer.collect_params().items() if name not in counted}
        counted.update(own)
        parameters = sum(int(np.prod(p.shape)) for p in own.values() if p.grad_req != "null")
        rows.append(Row(layer.name, type(layer).__name__, first.shape, parameters, sum(flops)))
        flops.clear()

    handles = [layer.register_forward_hook(count) for layer in blocks(net)]
    top = children(net) or [net]
    handles += [layer.register_forward_hook(close) for layer in top]
    try:
        output = net(data)
        # oneDNN reorders weights in place during an inference forward: nobody may read them before
        # it has ended.
        mx.nd.waitall()
        if net.collect_params().keys() - counted:  # parameters outside of any layer
            close(net, data, output)
    finally:
        for handle in handles:
            handle.detach()
    return rows


def as_text(rows: Sequence[Row]) -> str:
    """The rows as an aligned table with totals."""
    parameters, flops = sum(r.parameters for r in rows), sum(r.flops for r in rows)
    return aligned([*_cells(rows), ("total", "", "", f"{parameters:,}", f"{flops / 1e6:,.1f}")])


def as_markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, for TensorBoard's text tab."""
    head, *cells = map(" | ".join, _cells(rows))
    return "\n".join(f"| {row} |" for row in (head, "--- | --- | --- | --: | --:", *cells))


def _cells(rows: Sequence[Row]) -> List[Tuple[str, ...]]:
    """The head, and a line for each row."""
    lines = [
        (row.name, row.kind, str(row.output), f"{row.parameters:,}", f"{row.flops / 1e6:,.1f}")
        for row in rows
    ]
    return [("layer", "kind", "output shape", "parameters", "MFLOPs"), *lines]

"""What a net is made of: the seed's table of layers and shapes, with parameters and FLOPs."""

from __future__ import annotations

from typing import Any, List, NamedTuple, Sequence, Set, Tuple

import mxnet as mx
import numpy as np
from mxnet.gluon import Block, nn


class Row(NamedTuple):
    """A layer at the top of the net."""

    name: str
    kind: str
    output: Tuple[int, ...]  # with the batch in front
    parameters: int
    flops: int  # multiplications and additions of convolutions and dense layers, one forward


def summarize(net: Block, data: mx.nd.NDArray) -> List[Row]:
    """The layers of ``net`` on an input like ``data``, in the order they run.

    A Sequential is told layer by layer, as the seed prints it; any other block child by child in
    the order they are called. The net must be initialised; a forward in inference mode settles
    deferred shapes and moves nothing. Inside a hybridized block there is nothing to see.
    """
    rows: List[Row] = []
    flops: List[int] = []
    counted: Set[str] = set()  # names of parameters: a layer may be called twice or share them
    handles = []

    def count(layer: Block, inputs: Any, output: Any) -> None:
        if isinstance(output, mx.nd.NDArray):  # in a hybridized block it is a symbol
            flops.append(_layer_flops(layer, output))

    def close(layer: Block, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (list, tuple)) else output
        if not isinstance(first, mx.nd.NDArray):
            return
        own = {name: p for name, p in layer.collect_params().items() if name not in counted}
        counted.update(own)
        parameters = sum(int(np.prod(p.shape)) for p in own.values() if p.grad_req != "null")
        rows.append(Row(layer.name, type(layer).__name__, first.shape, parameters, sum(flops)))
        flops.clear()

    def hook(layer: Block) -> None:
        handles.append(layer.register_forward_hook(count))

    net.apply(hook)
    top = list(net._children.values()) or [net]
    handles += [layer.register_forward_hook(close) for layer in top]
    try:
        output = net(data)
        # In inference oneDNN lays weights out anew while it runs; whoever reads them before it
        # has ended gets them in the wrong order.
        mx.nd.waitall()
        if net.collect_params().keys() - counted:  # it has parameters that are in no layer
            close(net, data, output)
    finally:
        for handle in handles:
            handle.detach()
    return rows


def _layer_flops(layer: Block, output: Any) -> int:
    """2 x multiply-accumulates of one leaf layer; what does not multiply by weights is left out."""
    if isinstance(layer, (nn.Conv1D, nn.Conv2D, nn.Conv3D, nn.Dense)):
        per_output = int(np.prod(layer.weight.shape[1:]))
        return 2 * per_output * int(np.prod(output.shape))
    return 0


def as_text(rows: Sequence[Row]) -> str:
    """The rows as an aligned table, totals below."""
    cells = [("layer", "kind", "output shape", "parameters", "MFLOPs")]
    for row in rows:
        shape = "(" + ", ".join(map(str, row.output)) + ")"
        cells.append((row.name, row.kind, shape, f"{row.parameters:,}", f"{row.flops / 1e6:,.1f}"))
    parameters, flops = sum(r.parameters for r in rows), sum(r.flops for r in rows)
    cells.append(("total", "", "", f"{parameters:,}", f"{flops / 1e6:,.1f}"))
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    lines = []
    for line in cells:
        left = "  ".join(line[c].ljust(widths[c]) for c in range(3))
        lines.append(left + "  " + "  ".join(line[c].rjust(widths[c]) for c in (3, 4)))
    return "\n".join(lines)


def as_markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, for TensorBoard's text tab."""
    lines = [
        "| layer | kind | output shape | parameters | MFLOPs |",
        "| --- | --- | --- | --: | --: |",
    ]
    for row in rows:
        name, kind, output, parameters, flops = row
        lines.append(f"| {name} | {kind} | {output} | {parameters:,} | {flops / 1e6:,.1f} |")
    return "\n".join(lines)

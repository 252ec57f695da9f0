"""The operator graph of a net: for TensorBoard's GRAPHS tab, and what can be told by it."""

from __future__ import annotations

import json
from typing import Any, List

import mxnet as mx
from mxnet import gluon

from ..mxnet_internals import blocks, runs_its_graph_alone, traced_symbol

# Operators of common nets, none of which draws; there is no list of those that do.
_DRAWING_NOTHING = {
    *("null", "_copy", "amp_cast", "Cast", "Flatten", "Reshape", "transpose", "Concat"),
    *("Convolution", "Deconvolution", "FullyConnected", "BatchNorm", "LayerNorm", "Pooling"),
    *("Activation", "relu", "softmax", "log_softmax", "clip", "mean", "sum", "Pad"),
    *("elemwise_add", "elemwise_mul", "broadcast_add", "broadcast_mul", "_mul_scalar"),
}


def draws_nothing(net: gluon.Block) -> bool:
    """Whether it is known that no random number is drawn in a forward of ``net``."""
    graph = traced_symbol(net) if runs_its_graph_alone(net) else None
    return (
        graph is not None
        and {node["op"] for node in json.loads(graph.tojson())["nodes"]} <= _DRAWING_NOTHING
    )


def graph_def(net: gluon.HybridBlock) -> Any:
    """The graph of a net that can be hybridized, as tensorboardX's GraphDef.

    Blocks become scopes, which TensorBoard folds. The net is traced with symbols and not changed.
    """
    from tensorboardX.proto.attr_value_pb2 import AttrValue
    from tensorboardX.proto.graph_pb2 import GraphDef
    from tensorboardX.proto.node_def_pb2 import NodeDef
    from tensorboardX.proto.versions_pb2 import VersionDef

    nodes = json.loads(net(mx.sym.var("data")).tojson())["nodes"]
    # Outer before inner.
    prefixes = sorted({block.prefix for block in blocks(net)} - {""}, key=len)
    names = [_scoped(node["name"], prefixes) for node in nodes]
    graph = GraphDef(versions=VersionDef(producer=22))
    for name, node in zip(names, nodes):
        is_input = node["op"] == "null"
        attributes = {
            key: AttrValue(s=str(value).encode())
            for key, value in (node.get("attrs") or {}).items()
            if not key.startswith("__")
        }
        graph.node.append(
            NodeDef(
                name=name,
                op="Parameter" if is_input and node["name"] != "data" else node["op"],
                input=[names[source] for source, _, _ in node["inputs"]],
                attr=attributes,
            )
        )
    return graph


def _scoped(name: str, prefixes: List[str]) -> str:
    """``residual0_conv0_weight`` -> ``residual0/conv0/weight``."""
    scopes, start = [], 0
    for prefix in prefixes:
        if name.startswith(prefix) and len(prefix) > start:
            scopes.append(name[start : len(prefix)].rstrip("_"))
            start = len(prefix)
    return "/".join([*scopes, name[start:]])

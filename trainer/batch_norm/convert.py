"""Turns the batch norm layers of a net into synced ones and back, and finds them."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, List

from mxnet import gluon

from ..mxnet_internals import BatchNormBase, blocks, clear_graphs, every_parameter, traced_symbol
from .layer import SyncBatchNorm
from .rank_sum import RankSum


def convert_sync_batch_norm(net: gluon.Block, process_set: Any = None) -> gluon.Block:
    """Turn every batch norm layer of ``net`` into a SyncBatchNorm, in place; returns ``net``.

    Works on any tree of Blocks, hybridized or not, initialized or not, and on a part of a net. Each
    layer stays the same object, with its parameters, names and hooks, so references to it stay
    valid. Layers that are synced already move to ``process_set``. Convert again after the number of
    ranks has changed. Raises ValueError as :func:`check_convertible` does.
    """
    check_convertible(net)
    for layer in layers_of(net):
        if not isinstance(layer, SyncBatchNorm):
            layer.plain_class = type(layer)
            layer.__class__ = SyncBatchNorm
        layer.rank_sum = RankSum(process_set)
    clear_cached_graphs(net)
    return net


def connect(net: gluon.Block) -> None:
    """Have each synced layer of ``net`` find its peers, by its place in the net; collective.

    Otherwise each does so in its first training step, by the order in which the process has first
    used its layers, and through Horovod collectives one after another.
    """
    for place, layer in enumerate(layers_of(net)):
        rank_sum, channels = vars(layer).get("rank_sum"), layer.running_mean.shape[0]
        if rank_sum is not None and channels:
            rank_sum.connect_at(place, 2 * channels + 1)


def disconnect(net: gluon.Block) -> None:
    """Have each synced layer of ``net`` let go of what it shares with its peers.

    After the last step of all ranks, when none is under way.
    """
    for layer in layers_of(net):
        rank_sum = vars(layer).get("rank_sum")
        if rank_sum is not None:
            rank_sum.disconnect()


def revert_sync_batch_norm(net: gluon.Block) -> gluon.Block:
    """Turn each SyncBatchNorm of ``net`` back to its original class, in place; returns ``net``."""
    for layer in layers_of(net):
        if isinstance(layer, SyncBatchNorm):
            _revert(layer)
    clear_cached_graphs(net)
    return net


@contextlib.contextmanager
def layers_kept(net: gluon.Block) -> Iterator[None]:
    """Within it layers of ``net`` may be converted; afterwards they are what they were before."""
    layers = layers_of(net)
    rank_sums = [vars(layer).get("rank_sum") for layer in layers]
    try:
        yield
    finally:
        for layer, rank_sum in zip(layers, rank_sums):
            if rank_sum is not None:
                layer.rank_sum = rank_sum
            elif isinstance(layer, SyncBatchNorm):
                _revert(layer)
        clear_cached_graphs(net)


def is_synced(net: gluon.Block) -> bool:
    """Whether any layer of ``net`` is a SyncBatchNorm."""
    return any(isinstance(layer, SyncBatchNorm) for layer in layers_of(net))


def is_over_ranks(net: gluon.Block) -> bool:
    """Whether any layer of ``net`` normalizes over the samples of other ranks too."""
    return any(isinstance(one, SyncBatchNorm) and one.rank_sum.size > 1 for one in layers_of(net))


def _revert(layer: SyncBatchNorm) -> None:
    layer.__class__ = layer.plain_class
    del layer.plain_class, layer.rank_sum


def check_convertible(net: gluon.Block) -> None:
    """Refuse by ValueError a layer whose class overrides the forward of Gluon's batch norm, and a
    SymbolBlock with batch norm.
    """
    imported = next(iter(imported_statistics(net)), None)
    if imported is not None:
        raise ValueError(
            f"{imported.name} belongs to a SymbolBlock, whose batch norm cannot be synced over "
            "ranks; make the net in Python and take the weights by its load_parameters"
        )
    for layer in layers_of(net):
        cls = type(layer)
        plain = cls.hybrid_forward is BatchNormBase.hybrid_forward
        plain = plain and cls.forward is gluon.HybridBlock.forward
        if not plain and not isinstance(layer, SyncBatchNorm):
            raise ValueError(
                f"{layer.name} is a {cls.__name__}, which has a forward of its own and cannot be "
                "synced over ranks; use mxnet.gluon.nn.BatchNorm"
            )


def imported_statistics(net: gluon.Block) -> List[gluon.Parameter]:
    """The running statistics within SymbolBlocks."""
    found = [b for b in blocks(net) if isinstance(b, gluon.SymbolBlock)]
    graphs: List[Any] = [traced_symbol(block) for block in found]  # each is its graph
    return [b.params[n] for b, graph in zip(found, graphs) for n in graph.list_auxiliary_states()]


def layers_of(net: gluon.Block) -> List[Any]:
    """Gluon's batch norm layers within ``net``, each once, in the same order on every rank."""
    return [block for block in blocks(net) if isinstance(block, BatchNormBase)]


def clear_cached_graphs(net: gluon.Block) -> None:
    """Make what is hybridized, in ``net`` or around it, trace its layers again when called."""
    clear_graphs(every_parameter(net))

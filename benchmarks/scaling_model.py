"""Step time and efficiency on paper: data parallel training on 8 to 4,096 ranks.

What goes in is measured or given: each layer's forward and backward seconds, its gradient's bytes
and its norm layers (``benchmarks/layer_times.py``); latency and bandwidth of the links; Horovod's
settings. All functions are pure. The formulas, with n bytes, p ranks, latency a and bandwidth B:

- A ring allreduce takes 2 (p - 1) steps, each a message of n / p bytes (Patarasuk and Yuan,
  "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009):
  2 (p - 1) (a + n / (p B)). A flat ring over nodes goes at the pace of its slowest link.
- A hierarchical one, over m nodes of g ranks, reduces and gathers within each node, and in between
  g rings of n / g bytes share each node's network: 2 (g - 1) (a' + n / (g B')) +
  2 (m - 1) (a + n / (m B)).
- Small messages may take a tree, as NCCL's do: 2 ceil(log2 p) (a + n / B).
- Horovod (Sergeev and Del Balso, "Horovod: fast and easy distributed deep learning in TensorFlow",
  2018) looks once a cycle for gradients that are ready on all ranks, fuses what it finds up to a
  threshold, and sends one buffer after the other while backward continues: see :func:`last_sum`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import List, NamedTuple, Optional, Sequence, Tuple

FLOAT64_BYTES = 8


@dataclass(frozen=True)
class Layer:
    """A part of a chain of layers, measured on one rank's batch."""

    name: str
    forward: float  # seconds
    backward: float  # seconds
    gradient_bytes: int  # of float32
    norm_channels: Tuple[int, ...] = ()  # of each of its batch norm layers


@dataclass(frozen=True)
class Link:
    """One direction of a full-duplex link."""

    latency: float  # seconds for a message of no length
    bandwidth: float  # bytes a second


@dataclass(frozen=True)
class Cluster:
    """Nodes of ``ranks_per_node`` ranks (the last may have fewer) and the links between them."""

    ranks: int
    network: Link  # of a node, shared by its ranks
    ranks_per_node: int = 1
    within: Optional[Link] = None  # between ranks of one node
    hierarchical: bool = False  # HOROVOD_HIERARCHICAL_ALLREDUCE
    trees: bool = False  # small messages may take a tree: NCCL; Gloo has rings only

    @property
    def nodes(self) -> int:
        """How many nodes the ranks fill."""
        return -(-self.ranks // self.ranks_per_node)


@dataclass(frozen=True)
class Horovod:
    """How gradients travel."""

    bucket_bytes: float = 0.0  # a message ends with the gradient that fills it; 0: each its own
    fp16: bool = False
    cycle: float = 1e-3  # seconds, HOROVOD_CYCLE_TIME
    fusion_bytes: float = 0  # HOROVOD_FUSION_THRESHOLD, which the trainer sets to 0
    request: float = 0.0  # seconds in which ranks agree on what to sum, each time it looks
    norm_request: float = 0.0  # the same for a synced norm's sum, and what else that costs a rank
    cast: float = 0.0  # seconds to round a byte of float32 to float16 and back
    host: float = 0.0  # seconds of the core that computes, taken by each byte summed: 0 on GPUs


class Step(NamedTuple):
    """Seconds of one step, from its start."""

    forward: float
    backward: float  # ends
    allreduce: float  # ends
    step: float


def ring(size: float, ranks: int, link: Link) -> float:
    """Seconds of a ring allreduce of ``size`` bytes."""
    return 2 * (ranks - 1) * (link.latency + size / ranks / link.bandwidth)


def tree(size: float, ranks: int, link: Link) -> float:
    """Seconds of a reduction and a broadcast along a binary tree, not pipelined."""
    return 2 * math.ceil(math.log2(ranks)) * (link.latency + size / link.bandwidth)


def allreduce(size: float, cluster: Cluster) -> float:
    """Seconds of an allreduce of ``size`` bytes over all ranks, once it has begun."""
    if cluster.ranks == 1:
        return 0.0
    if cluster.nodes == 1:
        assert cluster.within is not None, "ranks of one node have a link"
        found = ring(size, cluster.ranks, cluster.within)
        link = cluster.within
    elif cluster.hierarchical:
        assert cluster.within is not None, "a hierarchy has links within nodes"
        found = ring(size, cluster.ranks_per_node, cluster.within)
        found += ring(size, cluster.nodes, cluster.network)
        link = cluster.network
    else:
        found = ring(size, cluster.ranks, cluster.network)
        link = cluster.network
    return min(found, tree(size, cluster.ranks, link)) if cluster.trees else found


def norm_sums(layer: Layer, cluster: Cluster, request: float) -> float:
    """Seconds that a layer's synced norms wait in one direction: a float64 pair a channel each."""
    if cluster.ranks == 1:
        return 0.0
    sizes = [(2 * channels + 1) * FLOAT64_BYTES for channels in layer.norm_channels]
    return sum(request + allreduce(size, cluster) for size in sizes)


def last_sum(ready: Sequence[Tuple[float, float]], cluster: Cluster, horovod: Horovod) -> float:
    """When the last gradient has been summed, in seconds.

    Args:
        ready: when each gradient is there and its bytes, in order of time.

    The background thread looks a cycle after its last look at the earliest, and not while it is
    sending; what comes while it idles waits half a cycle for it, on average. It takes all that is
    there, agrees with the other ranks in ``request`` seconds, cuts it into buffers of the fusion
    threshold, and sends them in turn.
    """
    free = looked = -math.inf
    index = 0
    while index < len(ready):
        idle = ready[index][0] > max(free, looked + horovod.cycle)
        looked = max(free, looked + horovod.cycle)
        if idle:
            looked = ready[index][0] + horovod.cycle / 2
        end = looked + horovod.request
        buffer = 0.0
        while index < len(ready) and ready[index][0] <= looked:
            size = ready[index][1]
            if buffer and buffer + size > horovod.fusion_bytes:
                end += allreduce(buffer, cluster)
                buffer = 0.0
            buffer += size
            index += 1
        free = end + allreduce(buffer, cluster)
    return free


def bucketed(ready: Sequence[Tuple[float, float]], limit: float) -> List[Tuple[float, float]]:
    """Gradients in buckets of ``limit`` bytes, each ready with the last, which fills it."""
    buckets: List[Tuple[float, float]] = []
    filling = 0.0
    for number, (time, size) in enumerate(ready, 1):
        filling += size
        if filling >= limit or number == len(ready):
            buckets.append((time, filling))
            filling = 0.0
    return buckets


def step(
    layers: Sequence[Layer],
    cluster: Cluster,
    horovod: Horovod,
    sync_batch_norm: bool = False,
    update: float = 0.0,
) -> Step:
    """Seconds of one step.

    Args:
        layers: in the order of forward.
        update: seconds after the last gradient is there: the optimizer, and all else.
    """
    waits = [norm_sums(layer, cluster, horovod.norm_request) * sync_batch_norm for layer in layers]
    forward = sum(layer.forward for layer in layers) + sum(waits)
    now, ready = forward, []
    for layer, wait in zip(reversed(layers), reversed(waits)):
        now += layer.backward + wait
        if layer.gradient_bytes:
            ready.append((now, layer.gradient_bytes / (2 if horovod.fp16 else 1)))
    summed = busy = now
    if cluster.ranks > 1:
        busy += horovod.host * sum(size for _, size in ready)
        summed = last_sum(
            bucketed(ready, horovod.bucket_bytes / (2 if horovod.fp16 else 1)), cluster, horovod
        )
        if horovod.fp16:
            summed += horovod.cast * sum(layer.gradient_bytes for layer in layers)
    return Step(forward, now, summed, max(busy, summed) + update)


def compute(layers: Sequence[Layer], update: float = 0.0) -> float:
    """Seconds of a step of one rank alone; over :func:`step`'s, the efficiency."""
    return sum(layer.forward + layer.backward for layer in layers) + update


def scaled(layers: Sequence[Layer], factor: float) -> List[Layer]:
    """The same layers on a device ``factor`` times as slow."""
    return [
        replace(layer, forward=layer.forward * factor, backward=layer.backward * factor)
        for layer in layers
    ]

"""A rank's replica of the net: initialised, on its device, with the configured batch norm."""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, Optional, Tuple

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import dist
from ..batch_norm import running_statistics
from ..config import Config
from ..data import sharding


def merge_running_statistics(net: gluon.Block, config: Config) -> None:
    """Merge the ranks' running statistics permanently; collective.

    Those of synced batch norm are equal already; for others a rank's weight is its shard size.
    """
    whole = np.arange(config.train.global_batch_size)
    own = sharding.shard(whole, dist.rank(), dist.world_size())
    synced = config.batch_norm == "sync"
    merge = running_statistics.average_others if synced else running_statistics.merge
    merge(net, len(own))


@contextlib.contextmanager
def as_one_model(net: gluon.Block, config: Config) -> Iterator[None]:
    """Within it the ranks have merged running statistics, then their own again; collective."""
    running = running_statistics.parameters(net)
    own = [p.data().asnumpy() for p in running]
    merge_running_statistics(net, config)
    try:
        yield
    finally:
        for parameter, values in zip(running, own):
            parameter.set_data(mx.nd.array(values, dtype=values.dtype))


def gather_statistics(net: gluon.Block, config: Config) -> Optional[np.ndarray]:
    """Every rank's running statistics, (ranks, elements), for an exact resume; collective.

    None where the merged ones suffice: with synced batch norm alone, on one rank, without any.
    """
    own = [p.data().asnumpy().ravel() for p in running_statistics.parameters(net)]
    equal = config.batch_norm == "sync" and not running_statistics.other_parameters(net)
    if equal or dist.world_size() == 1 or not own:
        return None
    return np.stack(dist.gather_objects(np.concatenate(own)))


def drift(net: gluon.Block, statistics: np.ndarray) -> Dict[str, float]:
    """Spread of the running means over ranks, in standard deviations of the activations.

    Args:
        statistics: what :func:`gather_statistics` gave.

    Returns:
        ``drift``, the root mean square over all channels of all layers, and ``drift_worst_layer``.
    """
    own = {p.name: part.astype(np.float64) for p, part in _by_parameter(net, statistics)}
    squares = []
    for name, means in own.items():
        if name.endswith("running_mean") and (variances := own.get(name[:-4] + "var")) is not None:
            squares.append(means.var(axis=0) / (variances.mean(axis=0) + 1e-12))
    if not squares:
        return {}
    worst = max(square.mean() for square in squares)
    return {
        "drift": float(np.sqrt(np.concatenate(squares).mean())),
        "drift_worst_layer": float(np.sqrt(worst)),
    }


def take_statistics(net: gluon.Block, statistics: Optional[np.ndarray]) -> None:
    """Restore this rank's row of :func:`gather_statistics`, unless the number of ranks changed."""
    if statistics is None or len(statistics) != dist.world_size():
        return
    for parameter, part in _by_parameter(net, statistics):
        values = part[dist.rank()].reshape(parameter.shape)
        parameter.set_data(mx.nd.array(values, dtype=parameter.dtype))


def _by_parameter(net: gluon.Block, statistics: np.ndarray) -> Iterator[Tuple[Any, np.ndarray]]:
    """Each running statistic, and its columns of what :func:`gather_statistics` gave."""
    running = running_statistics.parameters(net)
    ends = np.cumsum([int(np.prod(parameter.shape)) for parameter in running])
    return zip(running, np.split(statistics, ends[:-1], axis=1))

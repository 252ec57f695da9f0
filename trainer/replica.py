"""A rank's replica of the net: initialised, on its device, with the configured batch norm."""

from __future__ import annotations

import contextlib
from typing import Dict, Iterator, List, Optional, Tuple

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from . import batch_norm, dist, running_statistics, sharding, summary, users_net
from .config import Config
from .settings import ConfigError
from .step import Loss
from .users_code import describe_error


def prepare(
    net: gluon.Block, config: Config, shape: Tuple[int, int, int], ctx: mx.Context
) -> List[summary.Row]:
    """Initialise ``net`` on ``ctx``, settle its deferred shapes and convert its batch norm layers.

    Args:
        shape: (channels, height, width) of a sample.

    Returns:
        A row for each of its layers.

    Raises:
        ConfigError: the net cannot take such a sample, cannot be hybridized, or has a batch norm
            layer that cannot be converted.
    """
    users_net.check_mode()
    # Every rank draws the same weights.
    mx.random.seed(config.seed)
    np.random.seed(config.seed)
    if isinstance(net, gluon.SymbolBlock):
        raise ConfigError(
            "the net is a SymbolBlock, which could not load a checkpoint of itself; make it a part "
            "of one: net = nn.HybridSequential(); net.add(symbol_block)"
        )
    users_net.check_names(net)
    running_statistics.mark_imported(net)
    _initialize(net, ctx)
    _convert_batch_norm(net, config.batch_norm)
    if config.calibrate_samples:
        check_calibration(net)
    # Deferred shapes are settled here, on all ranks: otherwise Horovod broadcasts a parameter at
    # its first forward, where a forward on one rank alone would never return.
    if isinstance(net, gluon.HybridBlock):
        net.hybridize(active=False)  # hooks do not see the layers of a compiled net
    sample = mx.nd.zeros((1, *shape), ctx=ctx)
    try:
        layers = summary.summarize(net, sample)
    except Exception as error:
        raise ConfigError(
            f"the net cannot take an image of (channels, height, width) {shape}: "
            f"{describe_error(error)}; {users_net.way_out(net)}"
        ) from error
    users_net.check_parameters(net)
    if config.model.hybridize and isinstance(net, gluon.HybridBlock):
        net.hybridize(static_alloc=True)
        try:
            net(sample)
            mx.nd.waitall()
        except Exception as error:
            raise ConfigError(
                f"the net runs, but not compiled: {describe_error(error)}; correct it, or set "
                "model.hybridize=false"
            ) from error
    return layers


def check_calibration(net: gluon.Block) -> None:
    """Refuse a net whose running statistics cannot be calibrated.

    Raises:
        ConfigError: it has a batch norm of a class with its own forward.
    """
    try:
        batch_norm.check_convertible(net)
    except ValueError as error:
        raise ConfigError(
            f"running statistics cannot be calibrated: {error}, or leave calibrate out and set "
            "calibrate_samples=0"
        ) from error


def merge_running_statistics(net: gluon.Block, config: Config) -> None:
    """Merge the ranks' running statistics permanently; collective.

    Those of synced batch norm are equal already; for others a rank's weight is its shard size.
    """
    whole = np.arange(config.train.global_batch_size)
    own = sharding.shard(whole, dist.rank(), dist.world_size())
    if config.batch_norm == "sync":
        running_statistics.average_others(net, len(own))
    else:
        running_statistics.merge(net, len(own))


def class_scores(
    net: gluon.Block, shape: Tuple[int, int, int], ctx: mx.Context, classes: int
) -> int:
    """The number of scores that ``net`` gives a sample of ``shape`` (channels, height, width).

    Raises:
        ConfigError: the output is not a row of at least ``classes`` scores.
    """
    output = net(mx.nd.zeros((1, *shape), ctx=ctx))
    mx.nd.waitall()  # oneDNN reorders weights in place during a forward
    found = getattr(output, "shape", None)
    if found is None or len(found) != 2 or found[1] < classes:
        raise ConfigError(
            f"the net gives {found or type(output).__name__} for one sample; the data has "
            f"{classes} classes (labels, counted from 0, go up to {classes - 1}), so it must be "
            f"(1, {classes}) or wider, e.g. model.arguments={{num_classes: {classes}}}"
        )
    return int(found[1])


def check_loss(loss_of: Loss, scores: int, ctx: mx.Context) -> None:
    """Refuse a loss that does not give one value per sample, or has no gradient.

    Raises:
        ConfigError: it fails, has another shape, cannot be differentiated, or has parameters to be
            trained.
    """
    if isinstance(loss_of, type):
        name = loss_of.__name__
        raise ConfigError(f"the loss is the class {name}; give an instance of it, {name}()")
    own = loss_of.collect_params().values() if isinstance(loss_of, gluon.Block) else ()
    trained = [parameter.name for parameter in own if parameter.grad_req != "null"]
    if trained:
        raise ConfigError(
            f"the loss has parameters of its own ({', '.join(trained)}), which fit would not "
            "train; make them part of the net, and the loss a function of its scores"
        )
    given, label = mx.nd.zeros((2, scores), ctx=ctx), mx.nd.zeros((2,), ctx=ctx)
    given.attach_grad()
    try:
        with autograd.record():
            found = loss_of(given, label)
        mx.nd.waitall()
    except Exception as error:
        raise ConfigError(
            f"the loss cannot take scores (2, {scores}) and labels (2,): {describe_error(error)}"
        ) from error
    shape = getattr(found, "shape", None)
    if shape != (2,):
        raise ConfigError(
            f"the loss gives {shape or type(found).__name__} for 2 samples; it must be (2,), one "
            "number for each, as Gluon's losses give"
        )
    try:
        found.backward()
        mx.nd.waitall()
    except Exception as error:
        raise ConfigError(
            f"the loss has no gradient with respect to the scores: {describe_error(error)}; "
            "compute it by operators of MXNet, on the arrays it is given"
        ) from error


@contextlib.contextmanager
def as_one_model(net: gluon.Block, config: Config) -> Iterator[None]:
    """Within it the ranks have merged running statistics, afterwards their own again; collective.

    What is evaluated and saved is one model, and doing so does not influence training.
    """
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
    own: Dict[str, np.ndarray] = {}
    start = 0
    for parameter in running_statistics.parameters(net):
        stop = start + int(np.prod(parameter.shape))
        own[parameter.name] = statistics[:, start:stop].astype(np.float64)
        start = stop
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
    start = 0
    for parameter in running_statistics.parameters(net):
        stop = start + int(np.prod(parameter.shape))
        values = statistics[dist.rank(), start:stop].reshape(parameter.shape)
        parameter.set_data(mx.nd.array(values, dtype=parameter.dtype))
        start = stop


def _convert_batch_norm(net: gluon.Block, kind: str) -> None:
    for layer in batch_norm.layers_of(net):
        if isinstance(layer, gluon.contrib.nn.SyncBatchNorm):
            raise ConfigError(
                f"{layer.name} is Gluon's own SyncBatchNorm, which waits for other devices of its "
                "process, not for ranks; use nn.BatchNorm, and set batch_norm=sync"
            )
    if kind == "local":
        if batch_norm.is_synced(net):
            raise ConfigError(
                "batch_norm is local, and the net has SyncBatchNorm layers; set batch_norm=sync, "
                "or give the net through batch_norm.revert_sync_batch_norm"
            )
        return
    process_set = dist.node_process_set() if kind == "group" else None
    try:
        batch_norm.convert_sync_batch_norm(net, process_set)
    except ValueError as error:
        raise ConfigError(f"batch_norm is {kind}: {error}, or set batch_norm=local") from error


def _initialize(net: gluon.Block, ctx: mx.Context) -> None:
    """Initialise the parameters that are not yet (Xavier, as in the book); move the others."""
    for parameter in net.collect_params().values():
        try:
            parameter.reset_ctx(ctx)
            if parameter.shape is None:  # of a SymbolBlock with loaded weights
                parameter.shape = parameter.data().shape
        except ValueError:  # not initialised
            # The initializer of a constant is known by name, and only to the process that made it.
            constant = isinstance(parameter, gluon.Constant)
            own = mx.init.Constant(parameter.value) if constant else None
            try:
                parameter.initialize(own, default_init=mx.init.Xavier(), ctx=ctx)
            except ValueError as error:
                raise ConfigError(
                    f"{parameter.name} cannot be drawn: {error} Give it an init of its own, "
                    'e.g. params.get(..., init="ones")'
                ) from error

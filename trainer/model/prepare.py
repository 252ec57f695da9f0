"""Brings a net to the state in which a rank trains it, and checks that it can be trained."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Dict, Iterator, List, Tuple

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from .. import batch_norm, dist
from ..batch_norm import running_statistics
from ..config import Config
from ..console import warn
from ..data import randomness
from ..errors import ConfigError, describe_error
from ..mxnet_internals import blocks_by_path, ordered_parameters
from . import summary, users_net


def answers(net: gluon.Block, shape: Tuple[int, int, int], ctx: mx.Context) -> List[float]:
    """The :func:`scores` for a fixed image of ``shape`` (C, H, W), by which nets are told apart."""
    return scores(net, fixed_image(shape, ctx))


def scores(net: gluon.Block, image: mx.nd.NDArray) -> List[float]:
    """Those of images, (B, C, H, W), in inference; [] where they are drawn anew each time."""
    first, second = (net(image).asnumpy().ravel() for _ in range(2))
    return [float(score) for score in first] if np.array_equal(first, second) else []


def fixed_image(shape: Tuple[int, int, int], ctx: mx.Context) -> mx.nd.NDArray:
    """One image of noise, float32 (1, channels, height, width), always the same."""
    return mx.nd.array(np.random.RandomState(0).uniform(-2, 2, (1, *shape)), ctx=ctx)


@contextlib.contextmanager
def taking(image: mx.nd.NDArray) -> Iterator[None]:
    """Within it a net is run on ``image``, (B, C, H, W); ConfigError says what it cannot take."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the net cannot take {np.dtype(image.dtype).name} images of (channels, height, width) "
            f"{image.shape[1:]}, {len(image)} at once: {describe_error(error)}; correct the net, "
            "set data.image_size, or train another net"
        ) from error


@randomness.kept()
def check_state(net: gluon.Block, image: mx.nd.NDArray) -> None:
    """Refuse, by ConfigError, a net that does not give two images, like ``image``, (1, C, H, W), a
    row of scores each, or whose scores depend on arrays that training changes and that are no
    parameters: those would be neither saved nor the same on all ranks.

    As the moving mean of a batch norm of one's own. A net that holds arrays is run in training
    mode, and gets them back. Warns where an image's scores depend on what else is in its batch.
    """
    held = [
        (f"{path}.{name}"[1:], vars(block), name, value, value.copy())
        for path, block in blocks_by_path(net).items()
        for name, value in vars(block).items()
        if isinstance(value, (mx.nd.NDArray, np.ndarray))
    ]
    pair = mx.nd.concat(image, image * image, dim=0)  # unlike: equal ones have a variance of 0
    alone = scores(net, image)
    with taking(pair):
        before = net(pair).asnumpy().ravel()
    if not alone:
        return
    if len(before) != 2 * len(alone):
        raise ConfigError(
            f"the net gives {len(alone)} scores for one image, and {len(before)} for two; it must "
            "keep the first axis, of a batch's samples, as it is"
        )
    far = np.abs(np.subtract(before[: len(alone)], alone)).max()
    if far > 0.05 * np.abs(alone).max() and dist.is_root():  # by more than rounding to 16 bits
        warn(
            "the net's scores of an image depend on the other images in its batch, and so do the "
            "results on evaluate.batch_size and the number of ranks; take means over a sample's "
            "own axes, e.g. x.mean(axis=(1, 2, 3), keepdims=True)"
        )
    if not held:
        return
    running = [(p, p.data().copy()) for p in running_statistics.parameters(net)]
    with batch_norm.layers_kept(net), autograd.record():
        for layer in batch_norm.layers_of(net):
            if "rank_sum" in vars(layer):
                layer.rank_sum = SimpleNamespace(size=1, collected=None)  # not collective
        batch_norm.clear_cached_graphs(net)
        net(pair)
    for parameter, values in running:  # which cuDNN moves in a forward
        parameter.set_data(values)
    other = (net(pair).asnumpy().ravel() != before).any()
    moved = [at for at, own, k, value, was in held if own[k] is not value or (value != was).sum()]
    for _, own, name, value, copy in held:
        value[:] = copy
        own[name] = value
    if moved and other:
        raise ConfigError(
            f"training changes {', '.join(moved)}, which the net's scores depend on; it would be "
            "neither saved nor the same on all ranks: keep it as a parameter, self.params.get("
            '"mean", shape=..., init="zeros", differentiable=False), and change it by set_data'
        )


@randomness.kept()
def prepare_net(
    net: gluon.Block, config: Config, shape: Tuple[int, int, int], ctx: mx.Context
) -> List[summary.Row]:
    """Initialise ``net`` on ``ctx``, settle its deferred shapes and convert its batch norm layers.

    Returns a row for each of its layers; ``shape`` is (channels, height, width) of a sample.
    ConfigError: the net cannot take such a sample, cannot be hybridized, or has a batch norm layer
    that cannot be converted.
    """
    users_net.check_mode()
    if isinstance(net, gluon.SymbolBlock):
        raise ConfigError(
            "the net is a SymbolBlock, which could not load a checkpoint of itself; make it a part "
            "of one: net = nn.HybridSequential(); net.add(symbol_block)"
        )
    users_net.check_names(net)
    running_statistics.mark_imported(net)
    randomness.seed_all(config.seed)  # every rank draws the same weights, some at the first forward
    _initialize(net, ctx)
    _convert_batch_norm(net, config.batch_norm)
    if config.calibrate_samples:
        check_calibration(net)
    # Deferred shapes are settled here, on all ranks: otherwise Horovod broadcasts a parameter at
    # its first forward, where a forward on one rank alone would never return.
    if isinstance(net, gluon.HybridBlock):
        net.hybridize(active=False)  # hooks do not see the layers of a compiled net
    sample = mx.nd.zeros((1, *shape), ctx=ctx)
    with taking(sample):
        layers = summary.summarize(net, sample)
    users_net.check_parameters(net, config.optimizer.accumulate)
    if config.model.hybridize and isinstance(net, gluon.HybridBlock):
        net.hybridize(static_alloc=True, **_bulks(config, ctx))
        try:
            net(sample)
            mx.nd.waitall()
        except Exception as error:
            raise ConfigError(
                f"the net runs, but not compiled: {describe_error(error)}; correct it, or set "
                "model.hybridize=false"
            ) from error
    return layers


def _bulks(config: Config, ctx: mx.Context) -> Dict[str, int]:
    """How compiled operators are handed to the engine, if not in MXNet's bulks of 15.

    Where gradients cross a network, or go between GPUs, these would wait for each other: see
    docs/scaling.md, "How gradients travel".
    """
    settings = config.optimizer
    in_memory = ctx.device_type == "cpu" and settings.shared_memory and not settings.fp16_allreduce
    if dist.world_size() == 1 or (in_memory and dist.ranks_share_memory()):
        return {}
    return {"forward_bulk_size": 1, "backward_bulk_size": 1}


def check_calibration(net: gluon.Block) -> None:
    """Refuse a net with a batch norm of a class with its own forward, by ConfigError."""
    try:
        batch_norm.check_convertible(net)
    except ValueError as error:
        raise ConfigError(
            f"running statistics cannot be calibrated: {error}, or leave calibrate out and set "
            "calibrate_samples=0"
        ) from error


def class_scores(
    net: gluon.Block, shape: Tuple[int, int, int], ctx: mx.Context, classes: int
) -> mx.nd.NDArray:
    """The scores, (1, K), that ``net`` gives zeros of ``shape`` (channels, height, width).

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
    return output


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
    for parameter in ordered_parameters(net):
        try:
            parameter.reset_ctx(ctx)
            if parameter.shape is None:  # of a SymbolBlock with loaded weights
                parameter.shape = parameter.data().shape
        except ValueError:  # not initialised
            # The initializer of a constant is known by name, and only to the process that made it.
            constant = isinstance(parameter, gluon.Constant)
            own = mx.init.Constant(parameter.value) if constant else parameter.init
            try:
                own = mx.init.create(own) if isinstance(own, str) else own  # unknown? not later
                parameter.initialize(own, default_init=mx.init.Xavier(), ctx=ctx)
            except (AssertionError, ValueError) as error:
                raise ConfigError(
                    f"{parameter.name} cannot be drawn: {str(error).rstrip('.')}; give it an init "
                    'of its own, e.g. params.get(..., init="ones")'
                ) from error

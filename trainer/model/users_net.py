"""A user's net: checked, and left as it was given to ``fit``, except for its weights."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, List

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import batch_norm, dist
from ..errors import ConfigError
from ..mxnet_internals import compilation_of, set_compilation, set_trainer, trainer_of


def check_mode() -> None:
    """Refuse MXNet's NumPy mode, in which layers take other arrays than those of ``fit``.

    Raises:
        ConfigError: ``mxnet.npx.set_np()`` is in force.
    """
    if mx.util.is_np_array():
        raise ConfigError(
            "MXNet's NumPy mode is on (mxnet.npx.set_np()), and fit works on the arrays of "
            "mxnet.nd; call mxnet.npx.reset_np() before the net is made"
        )


def way_out(net: gluon.Block) -> str:
    """What to do about a ``net`` that fails on images, for a message."""
    given = [parameter.dtype for parameter in net.collect_params().values()]  # texts or types
    others = (name for name in ("float16", "float64") if {name, np.dtype(name).type} & {*given})
    other = next(others, None)
    if other is None:
        return "correct the net, set data.image_size, or train another net"
    return (
        f"its weights are {other}, and fit gives it float32 images: leave net.cast out, or cast "
        "the images in its forward"
    )


def check_names(net: gluon.Block) -> None:
    """Refuse a net in which two parameters have one name.

    Raises:
        ConfigError: naming them.
    """
    try:
        net.collect_params()
    except AssertionError as error:
        raise ConfigError(
            f"two layers of the net have parameters of one name ({error}); give them other "
            "prefixes, or none"
        ) from error


def check_parameters(net: gluon.Block) -> None:
    """Refuse parameters whose gradients cannot be reduced over ranks; after a forward of ``net``.

    Raises:
        ConfigError: none is trained, a shape is still unknown, or a gradient is sparse.
    """
    trained = [p for p in net.collect_params().values() if p.grad_req != "null"]
    if not trained:
        raise ConfigError("the net has no parameter that is trained (grad_req is null for all)")
    # A shape first inferred within a training step would have to be so on all ranks at once.
    unknown = []
    for parameter in net.collect_params().values():
        try:
            parameter.list_data()
        except gluon.parameter.DeferredInitializationError:
            unknown.append(parameter.name)
    if unknown:
        raise ConfigError(
            f"the net does not use {', '.join(unknown)} in inference, which leaves their shapes "
            "unknown; give the layer in_units or in_channels, or leave it out"
        )
    sparse = [p.name for p in trained if p.list_grad()[0].stype != "default"]
    if sparse and dist.world_size() > 1:
        raise ConfigError(
            f"{', '.join(sparse)}: gradients are sparse, which cannot be added up over ranks; "
            "set sparse_grad=False"
        )


@contextlib.contextmanager
def restored(net: gluon.Block) -> Iterator[None]:
    """Within it ``net`` may be prepared and trained; afterwards its weights alone have changed.

    Restores how each block is hybridized, the class of batch norm layers, and each parameter's
    ``grad_req``, ``lr_mult``, ``wd_mult`` and trainer. Compiled graphs are dropped, after which the
    net can be pickled. Parameters stay initialised, and on their device.
    """
    parameters = _parameters(net)
    attributes = [(p.grad_req, p.lr_mult, p.wd_mult, trainer_of(p)) for p in parameters]
    compiled = [block for block in _blocks(net) if isinstance(block, gluon.HybridBlock)]
    compilations = [compilation_of(block) for block in compiled]
    try:
        with batch_norm.layers_kept(net):
            yield
    finally:
        for block, before in zip(compiled, compilations):
            set_compilation(block, before)
        for parameter, (grad_req, lr_mult, wd_mult, trainer) in zip(parameters, attributes):
            parameter.grad_req = grad_req
            parameter.lr_mult, parameter.wd_mult = lr_mult, wd_mult
            set_trainer(parameter, trainer)  # the run's own holds the optimizer's arrays


def _blocks(net: gluon.Block) -> List[gluon.Block]:
    blocks: List[gluon.Block] = []
    net.apply(blocks.append)
    return blocks


def _parameters(net: gluon.Block) -> List[Any]:
    """Each once. Unlike ``collect_params`` this does not fail where two have the same name."""
    found = {id(p): p for block in _blocks(net) for p in block.params.values()}
    return list(found.values())

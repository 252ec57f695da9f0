"""A user's net: checked, and left as it was given to ``fit``, except for its weights."""

from __future__ import annotations

import contextlib
import re
from typing import Any, Dict, Iterator, List

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from .. import batch_norm, dist
from ..errors import ConfigError
from ..mxnet_internals import (
    compilation_kept,
    set_trainer,
    structural_parameters,
    traced_symbol,
    trainer_of,
)


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


def check_compiled(net: gluon.Block, data: mx.nd.NDArray) -> None:
    """Refuse what a net has compiled where MXNet 1.9.1 gives it wrong gradients.

    Those of ``F.contrib.cond`` are garbage, often finite, and now and then right by chance. With
    ``foreach`` or ``while_loop`` in it the net's gradients are compared with those that it has when
    it is not compiled.

    Args:
        data: float32 (B, C, H, W), on the net's device.

    Raises:
        ConfigError: naming the operator or the first parameter.
    """
    compiled = [block for block in _blocks(net) if isinstance(block, gluon.HybridBlock)]
    graphs = [graph.tojson() for graph in map(traced_symbol, compiled) if graph is not None]
    used = set(re.findall('"op": "_(cond|foreach|while_loop)"', "".join(graphs)))
    operators, wrong = " and ".join(f"F.contrib.{name}" for name in sorted(used)), ""
    if used and "cond" not in used:
        found = _gradients(net, data)
        with compilation_kept(compiled):
            for block in compiled:
                block.hybridize(active=False)
            expected = _gradients(net, data)
        net(data)  # compiles it again
        wrong = next((name for name in found if _differ(found[name], expected[name])), "")
        wrong = wrong and f" (here those of {wrong})"
    if wrong or "cond" in used:
        raise ConfigError(
            f"the net is compiled and has {operators}, whose gradients MXNet {mx.__version__} gets "
            f"wrong in compiled nets{wrong}; set model.hybridize=false, or choose with F.where"
        )


def _gradients(net: gluon.Block, data: mx.nd.NDArray) -> Dict[str, np.ndarray]:
    """Those of the net's parameters, in inference mode, which draws nothing; by structural name."""
    named = structural_parameters(net).items()
    trained = {name: parameter for name, parameter in named if parameter.grad_req != "null"}
    with autograd.record(train_mode=False):
        scores = net(data)
    weights = np.random.RandomState(0).uniform(-1, 1, scores.shape)
    scores.backward(mx.nd.array(weights, ctx=scores.context, dtype=scores.dtype))
    found = {name: parameter.grad().asnumpy() for name, parameter in trained.items()}
    for parameter in trained.values():
        parameter.zero_grad()
    return found


def _differ(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether by more than rounding, be it in 16 bits; NaN differs."""
    return not (abs(found - expected) <= 0.05 * abs(expected).max() + 1e-6).all()


@contextlib.contextmanager
def restored(net: gluon.Block) -> Iterator[None]:
    """Within it ``net`` may be prepared and trained; afterwards its weights alone have changed.

    Restores how each block is hybridized, the class of batch norm layers, and each parameter's
    ``grad_req``, ``lr_mult``, ``wd_mult`` and trainer. Compiled graphs are dropped, after which the
    net can be pickled. Parameters stay initialised, and on their device.
    """
    parameters = _parameters(net)
    attributes = [(p.grad_req, p.lr_mult, p.wd_mult, trainer_of(p)) for p in parameters]
    try:
        with compilation_kept(_blocks(net)), batch_norm.layers_kept(net):
            yield
    finally:
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

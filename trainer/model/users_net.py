"""A user's net: checked, and left as it was given to ``fit``, except for its weights."""

from __future__ import annotations

import contextlib
import re
from typing import Dict, Iterator, List

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from .. import batch_norm, dist
from .. import mxnet_internals as internals
from ..errors import ConfigError


def check_mode() -> None:
    """Refuse MXNet's NumPy mode, in which layers take other arrays than ``fit``, by ConfigError."""
    if mx.util.is_np_array():
        raise ConfigError(
            "MXNet's NumPy mode is on (mxnet.npx.set_np()), and fit works on the arrays of "
            "mxnet.nd; call mxnet.npx.reset_np() before the net is made"
        )


def check_names(net: gluon.Block) -> None:
    """Refuse a net in which two parameters have one name; ConfigError names them."""
    try:
        net.collect_params()
    except AssertionError as error:
        raise ConfigError(
            f"two layers of the net have parameters of one name ({error}); give them other "
            "prefixes, or none"
        ) from error


def check_parameters(net: gluon.Block, accumulate: int) -> None:
    """Refuse, by ConfigError, a net after whose forward no parameter is trained, a shape is still
    unknown, or a gradient is sparse and to be added up: over ranks, or ``accumulate`` times."""
    trained = [p for p in net.collect_params().values() if p.grad_req != "null"]
    if not trained:
        raise ConfigError("the net has no parameter that is trained (grad_req is null for all)")
    # A shape first inferred within a training step would have to be so on all ranks at once.
    unknown = [p.name for p in internals.every_parameter(net) if not internals.is_initialised(p)]
    if unknown:
        raise ConfigError(
            f"the net does not use {', '.join(unknown)} in inference, which leaves their shapes "
            "unknown; give the layer in_units or in_channels, or leave it out"
        )
    sparse = [p.name for p in trained if p.list_grad()[0].stype != "default"]
    if sparse and (dist.world_size() > 1 or accumulate > 1):
        raise ConfigError(
            f"{', '.join(sparse)}: gradients are sparse, which cannot be added up over ranks, nor "
            "by optimizer.accumulate; set sparse_grad=False"
        )


def structure(net: gluon.Block) -> List[str]:
    """A line for each of the net's parameters, sorted by structural name."""
    first: Dict[int, str] = {}  # name of a parameter that layers share
    return [
        f"{name} {parameter.shape} {np.dtype(parameter.dtype).name}"
        f"{', trained' if parameter.grad_req != 'null' else ''}"
        f"{f', that of {shared}' if shared != name else ''}"
        for name, parameter in sorted(internals.structural_parameters(net).items())
        for shared in (first.setdefault(id(parameter), name),)
    ]


def settings(net: gluon.Block) -> List[str]:
    """A line for each multiplier other than 1, and for each of Gluon's layers without parts.

    Not for imported graphs, whose names depend on the process, nor for functions: some have none.
    """
    lines = [
        f"{name} lr_mult {parameter.lr_mult}, wd_mult {parameter.wd_mult}"
        for name, parameter in sorted(internals.structural_parameters(net).items())
        if (parameter.lr_mult, parameter.wd_mult) != (1, 1)
    ]
    for path, block in sorted(internals.blocks_by_path(net).items()):
        named = not isinstance(block, (gluon.SymbolBlock, gluon.nn.Lambda))
        gluons = named and type(block).__module__.startswith("mxnet.")
        if gluons and not internals.children(block):
            lines.append(f"{path[1:]} {block}")
    return lines


def check_compiled(net: gluon.Block, data: mx.nd.NDArray) -> None:
    """Refuse what a net has compiled where MXNet 1.9.1 gives it wrong gradients.

    Those of ``F.contrib.cond`` are garbage; with ``foreach`` or ``while_loop`` they are compared
    with those of the net when it is not compiled. ``data`` is float32 (B, C, H, W), on the net's
    device; ConfigError names the operator, and the first parameter.
    """
    compiled = [block for block in internals.blocks(net) if isinstance(block, gluon.HybridBlock)]
    graphs = [
        graph.tojson() for graph in map(internals.traced_symbol, compiled) if graph is not None
    ]
    used = set(re.findall('"op": "_(cond|foreach|while_loop)"', "".join(graphs)))
    operators, wrong = " and ".join(f"F.contrib.{name}" for name in sorted(used)), ""
    if used and "cond" not in used:
        found = _gradients(net, data)
        with internals.compilation_kept(compiled):
            for block in compiled:
                block.hybridize(active=False)
            expected = _gradients(net, data)
        net(data)  # compiles it again
        # By more than rounding, be it in 16 bits; NaN differs.
        bound = {n: 0.05 * abs(right).max() + 1e-6 for n, right in expected.items()}
        far = [n for n in found if not (abs(found[n] - expected[n]) <= bound[n]).all()]
        wrong = f" (here those of {far[0]})" if far else ""
    if wrong or "cond" in used:
        raise ConfigError(
            f"the net is compiled and has {operators}, whose gradients MXNet {mx.__version__} gets "
            f"wrong in compiled nets{wrong}; set model.hybridize=false, or choose with F.where"
        )


def _gradients(net: gluon.Block, data: mx.nd.NDArray) -> Dict[str, np.ndarray]:
    """Those of the net's parameters, in inference mode, which draws nothing; by structural name."""
    named = internals.structural_parameters(net).items()
    trained = {name: parameter for name, parameter in named if parameter.grad_req != "null"}
    with autograd.record(train_mode=False):
        scores = net(data)
    weights = np.random.RandomState(0).uniform(-1, 1, scores.shape)
    scores.backward(mx.nd.array(weights, ctx=scores.context, dtype=scores.dtype))
    found = {name: parameter.grad().asnumpy() for name, parameter in trained.items()}
    for parameter in trained.values():
        parameter.zero_grad()
    return found


@contextlib.contextmanager
def restored(net: gluon.Block) -> Iterator[None]:
    """Within it ``net`` may be prepared and trained; afterwards its weights alone have changed.

    Restores how each block is hybridized, the class of batch norm layers, and each parameter's
    ``grad_req``, ``lr_mult``, ``wd_mult`` and trainer. Compiled graphs are dropped, after which the
    net can be pickled. Parameters stay initialised, and on their device.
    """
    hybrid = [block for block in internals.blocks(net) if isinstance(block, gluon.HybridBlock)]
    with contextlib.ExitStack() as kept:
        kept.enter_context(internals.training_kept(internals.every_parameter(net)))
        kept.enter_context(internals.compilation_kept(hybrid))
        kept.enter_context(batch_norm.layers_kept(net))
        yield

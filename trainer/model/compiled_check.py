"""Compares a compiled net's gradients with the imperative ones, where MXNet may get them wrong.

The gradient that MXNet 1.9.1's compiled ``F.contrib.cond`` passes on to its inputs is garbage,
often finite, and now and then right by chance, so that no comparison is to be trusted: it is
refused. Nets with other control flow are compared once, nets without any are not looked at.
"""

from __future__ import annotations

import re
from typing import Callable, Dict, List, Set

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from ..data import randomness
from ..errors import ConfigError
from ..mxnet_internals import has_fresh_gradient, mark_gradient_as_fresh, traced_symbol

_CONTROL_FLOW = re.compile(r'"op": "_(cond|foreach|while_loop)"')

_SAMPLES = 8
_TOLERANCE = 0.05  # of a gradient's norm: bfloat16 rounds to 0.004, and what is sought is far off


def check(net: gluon.Block, data: Callable[[], mx.nd.NDArray]) -> None:
    """Refuse a compiled net whose gradients are not those that it has when it is not compiled.

    A net without control flow costs nothing but a look at its graph. Others stay compiled, with the
    gradients and running statistics that they had.

    Args:
        net: hybridized and initialised, after a forward.
        data: gives a batch, (B, channels, height, width).

    Raises:
        ConfigError: naming the operator and the parameter.
    """
    found = control_flow(net)
    if "cond" in found:
        raise ConfigError(
            f"the net is compiled and has F.contrib.cond, whose gradients MXNet {mx.__version__} "
            "gets wrong in compiled nets; set model.hybridize=false, or choose with F.where"
        )
    if not found:
        return
    batch = data()[:_SAMPLES]
    trained = [p for p in net.collect_params().values() if p.grad_req != "null"]
    arrays = [p.data() for p in trained]
    before = [(p.grad().copy(), has_fresh_gradient(array)) for p, array in zip(trained, arrays)]
    with randomness.kept():
        own = _gradients(net, trained, batch)
        net.hybridize(active=False)
        try:
            right = _gradients(net, trained, batch)
        finally:
            net.hybridize(static_alloc=True)
            net(batch)
            for parameter, array, (gradient, fresh) in zip(trained, arrays, before):
                gradient.copyto(parameter.grad())
                mark_gradient_as_fresh(array, fresh)
            mx.nd.waitall()
    _compare(own, right, found)


def control_flow(net: gluon.Block) -> Set[str]:
    """Which of ``cond``, ``foreach`` and ``while_loop`` a net has in the graphs it has compiled."""
    found: Set[str] = set()

    def look(block: gluon.Block) -> None:
        graph = traced_symbol(block) if isinstance(block, gluon.HybridBlock) else None
        if graph is not None:
            found.update(_CONTROL_FLOW.findall(graph.tojson()))

    net.apply(look)
    return found


def _gradients(
    net: gluon.Block, trained: List[gluon.Parameter], batch: mx.nd.NDArray
) -> Dict[str, np.ndarray]:
    """Gradients by name of a sum of the scores with drawn weights; in inference mode, so that
    running statistics stay as they are and no other rank is waited for.
    """
    for parameter in trained:
        parameter.zero_grad()
    randomness.seed_all(0)
    with autograd.record(train_mode=False):
        scores = net(batch)
    weights = np.random.RandomState(0).randn(*scores.shape)
    scores.backward(mx.nd.array(weights, ctx=batch.context, dtype=scores.dtype), train_mode=False)
    return {p.name: p.grad().asnumpy().astype(np.float64) for p in trained}


def _compare(own: Dict[str, np.ndarray], right: Dict[str, np.ndarray], found: Set[str]) -> None:
    largest = max(float(np.linalg.norm(gradient)) for gradient in right.values())
    for name, gradient in right.items():
        with np.errstate(all="ignore"):
            difference = float(np.linalg.norm(own[name] - gradient))
        norm = float(np.linalg.norm(gradient))
        if not difference <= _TOLERANCE * norm + 1e-4 * largest:
            used = " and ".join(f"F.contrib.{operator}" for operator in sorted(found))
            raise ConfigError(
                f"the net has {used}, and compiled its gradient of {name} is {difference:.1e} away "
                f"from that of the net as it is, whose norm is {norm:.1e}; set "
                "model.hybridize=false"
            )

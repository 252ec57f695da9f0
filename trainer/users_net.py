"""Leaves a user's net as it was given to ``fit``, except that its weights are trained."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, List

from mxnet import gluon

from . import batch_norm

_COMPILATION = ("_active", "_flags", "_backend", "_backend_opts")  # set by HybridBlock.hybridize


@contextlib.contextmanager
def restored(net: gluon.Block) -> Iterator[None]:
    """Within it ``net`` may be prepared and trained; afterwards its weights alone have changed.

    Restores how each block is hybridized, the class of batch norm layers, and each parameter's
    ``grad_req``, ``lr_mult``, ``wd_mult`` and trainer. Compiled graphs are dropped, after which the
    net can be pickled. Parameters stay initialised, and on their device.
    """
    parameters = _parameters(net)
    attributes = [(p.grad_req, p.lr_mult, p.wd_mult, p._trainer) for p in parameters]
    compiled = [block for block in _blocks(net) if isinstance(block, gluon.HybridBlock)]
    compilation = [{name: vars(block)[name] for name in _COMPILATION} for block in compiled]
    try:
        with batch_norm.layers_kept(net):
            yield
    finally:
        for block, before in zip(compiled, compilation):
            vars(block).update(before)
        for parameter, (grad_req, lr_mult, wd_mult, trainer) in zip(parameters, attributes):
            parameter.grad_req = grad_req
            parameter.lr_mult, parameter.wd_mult = lr_mult, wd_mult
            parameter._trainer = trainer  # the run's own holds the optimizer's arrays


def _blocks(net: gluon.Block) -> List[gluon.Block]:
    blocks: List[gluon.Block] = []
    net.apply(blocks.append)
    return blocks


def _parameters(net: gluon.Block) -> List[Any]:
    """Each once. Unlike ``collect_params`` this does not fail where two have the same name."""
    found = {id(p): p for block in _blocks(net) for p in block.params.values()}
    return list(found.values())

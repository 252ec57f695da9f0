"""The optimizer, and the trainer that averages gradients over ranks."""

from __future__ import annotations

import fnmatch
import functools
import os
import pickle
from typing import Any, Dict, Mapping, Optional, Sequence

import mxnet as mx
from mxnet import gluon

from .. import dist
from ..config import Optimizer
from ..config.schema import BUCKET_MB
from ..errors import ConfigError, nearest
from ..mxnet_internals import (
    all_parameters,
    allreduce_of,
    devices,
    divide_by,
    has_sparse_gradients,
    ordered_parameters,
    set_allreduce,
    structural_parameters,
)
from . import momentum
from .buckets import Buckets
from .shared_gradients import SharedGradients

_SHOWN = 4  # parameters, in a message
_IN_ONE_PASS = {"sgd": momentum.SGD, "nag": momentum.NAG}
# Arguments of MXNet's optimizers. What LBSGD adds up over batch_scale steps is in no checkpoint.
_IN_NO_CHECKPOINT = {"cumgrads"}
_DONE_OTHERWISE = {
    "lr_scheduler": "the settings of schedule do that",
    "batch_scale": "optimizer.accumulate does that",
}


def make_optimizer(settings: Optimizer) -> mx.optimizer.Optimizer:
    """The MXNet optimizer that ``settings`` describe, with ``moved``: see :func:`_try_out`.

    Raises ConfigError if none has that name, it refuses an argument, or its updates change what a
    checkpoint cannot hold.
    """
    name = "nag" if settings.nesterov else settings.name.lower()
    known = sorted(mx.optimizer.Optimizer.opt_registry)
    if name not in known:
        raise ConfigError(
            f"optimizer.name is {settings.name!r}{nearest(name, known)}; "
            f"MXNet has {', '.join(known)}"
        )
    arguments: Dict[str, Any] = {"learning_rate": settings.lr, "wd": settings.weight_decay}
    if name in ("sgd", "nag"):
        arguments["momentum"] = settings.momentum
    twice = sorted(arguments.keys() & settings.arguments.keys())
    if twice:
        setting = {"learning_rate": "lr", "wd": "weight_decay"}.get(twice[0], twice[0])
        raise ConfigError(f"optimizer.arguments has {twice[0]}; set optimizer.{setting} instead")
    for argument, instead in _DONE_OTHERWISE.items():
        if argument in settings.arguments:
            raise ConfigError(f"optimizer.arguments has {argument}; {instead}")
    try:
        make = _IN_ONE_PASS.get(name) or functools.partial(mx.optimizer.create, name)
        moved = _try_out(make(**{**arguments, **settings.arguments}))
        optimizer = make(**{**arguments, **settings.arguments})
    except Exception as error:  # MXNet checks some arguments nowhere, others in the first update
        lines = str(error).splitlines() or [f"{type(error).__name__} in its update of a vector"]
        raise ConfigError(f"optimizer.arguments do not fit {name}: {lines[0]}") from error
    for attribute, value in moved.items():
        if not isinstance(value, (int, float, type(None))):
            raise ConfigError(
                f"optimizer.name is {settings.name!r}, whose update changes its {attribute}, a "
                f"{type(value).__name__}, which no checkpoint holds; keep plain numbers in its "
                "attributes, and arrays in create_state"
            )
    optimizer.moved = sorted(moved)
    return optimizer


def _try_out(optimizer: mx.optimizer.Optimizer) -> Dict[str, Any]:
    """Update a vector, such as a bias is; the optimizer's own attributes that this has changed."""
    before = {name: _content(value) for name, value in optimizer.__getstate__().items()}
    weight, gradient = mx.nd.ones(2), mx.nd.ones(2)
    mx.optimizer.get_updater(optimizer)([0], [gradient], [weight])
    weight.wait_to_read()
    others = vars(mx.optimizer.Optimizer()).keys() | _IN_NO_CHECKPOINT
    own = {n: value for n, value in optimizer.__getstate__().items() if n not in others}
    return {name: v for name, v in own.items() if _content(v) != before.get(name)}


def _content(value: Any) -> Any:
    try:
        return pickle.dumps(value)
    except Exception:  # whatever the user's own class raises
        return id(value)


def make_trainer(net: gluon.Block, settings: Optimizer) -> gluon.Trainer:
    """The distributed trainer of ``net``, which must be initialised; on every rank.

    ``lr_mult`` replaces the parameters' own where a pattern fits. Unless asked for, gamma, beta and
    biases (parameters of at most one dimension) do not decay. Raises ConfigError if a pattern of
    ``lr_mult`` fits nothing, ValueError as :func:`gluon_trainer`.
    """
    optimizer = make_optimizer(settings)
    _set_lr_mult(net, settings.lr_mult)
    # By number, because a trainer sorts by its keys, and gradients are matched over ranks by place.
    parameters = {f"{place:08d}": p for place, p in enumerate(ordered_parameters(net))}
    for parameter in parameters.values():
        if parameter.grad_req == "null":
            continue
        if len(parameter.shape) <= 1 and not settings.decay_norm_and_bias:
            parameter.wd_mult = 0.0
        # Whatever the user or an earlier run of this net left there.
        parameter.grad_req = "add" if settings.accumulate > 1 else "write"
    way = settings.fp16_allreduce, settings.bucket_mb, settings.shared_memory
    trainer = gluon_trainer(parameters, optimizer, *way, list(net.collect_params().values()))
    if isinstance(optimizer, momentum.InOnePass):
        optimizer.may_wait = _waits_anyway(trainer)
    return trainer


def _set_lr_mult(net: gluon.Block, factors: Mapping[str, float]) -> None:
    named = structural_parameters(net)
    for pattern, factor in factors.items():
        fitting = fnmatch.filter(named, pattern)
        if not fitting:
            raise ConfigError(
                f"optimizer.lr_mult has {pattern!r}, which fits no parameter of the net; it has "
                f"{', '.join(list(named)[:_SHOWN])}, ..."
            )
        for name in fitting:
            named[name].lr_mult = factor


def _waits_anyway(trainer: gluon.Trainer) -> bool:
    """Whether this process waits for backward before the update, or has one core for everything.

    Elsewhere the host enqueues the next step while the device computes.
    """
    if dist.world_size() == 1:
        return os.environ.get("OMP_NUM_THREADS") == "1"
    in_memory = isinstance(allreduce_of(trainer), SharedGradients)
    if not in_memory or devices(trainer)[0].device_type != "cpu":
        return False
    return dist.ranks_share_memory() or dist.leaders_process_set() is not None


def gluon_trainer(
    parameters: Any,
    optimizer: mx.optimizer.Optimizer,
    fp16: bool = False,
    bucket_mb: float = BUCKET_MB,
    shared_memory: bool = True,
    forward: Optional[Sequence[gluon.Parameter]] = None,
) -> mx.gluon.Trainer:
    """Gluon's trainer, with gradients averaged over ranks by Horovod where there are several.

    Args:
        parameters: parameters by name; sorted by these names they must match over ranks.
        fp16: send gradients as float16. Pays only where the link is slower than the rounding.
        bucket_mb: megabytes of the buckets in which gradients are reduced (see buckets.py).
        shared_memory: where all ranks compute on the CPUs of one node, reduce gradients in shared
            memory instead (see shared_gradients.py).
        forward: the parameters in the order in which forward uses them, as far as is known.

    The first step moves gradients to where they are reduced, so code that reads them must call
    ``parameter.grad()`` in every step. Raises ValueError where they are sparse, for which Horovod
    writes beyond their memory, or on several devices, of which it would reduce the first one's; and
    ConfigError where the optimizer would not keep the weights of several ranks alike.
    """
    trainer = gluon.Trainer(parameters, optimizer, kvstore=None)
    if dist.world_size() == 1:
        return trainer
    if isinstance(trainer.optimizer, mx.optimizer.SGLD):
        raise ConfigError(
            "the optimizer is SGLD, whose noise each rank would draw for itself, so that their "
            "weights would part; train on one rank, or take another optimizer"
        )
    if len(devices(trainer)) > 1:
        raise ValueError(
            f"the net is on {', '.join(map(str, devices(trainer)))}; a rank trains it on one: "
            "net.collect_params().reset_ctx(ctx), before the trainer is made"
        )
    if has_sparse_gradients(trainer):
        raise ValueError(
            "gradients are sparse, which cannot be added up over ranks; set sparse_grad=False"
        )
    divide_by(trainer, dist.world_size())
    own = all_parameters(trainer)
    buckets = Buckets(own, forward or own, bucket_mb, fp16)
    set_allreduce(trainer, buckets)
    if isinstance(optimizer, momentum.InOnePass):
        optimizer.place_of = buckets.place_of
    if shared_memory:
        set_allreduce(trainer, SharedGradients(trainer))
    return trainer

"""The learning-rate schedule, the optimizer, and the trainer that averages gradients over ranks."""

from __future__ import annotations

import functools
import math
import os
from typing import Any, Callable, Dict, List, Optional

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import dist, momentum, shared_gradients
from .config import Config, Optimizer, Schedule
from .placement import dense_on_cpu, memory_of
from .settings import ConfigError, nearest


def peak_lr(optimizer: Optimizer, global_batch_size: int) -> float:
    """The learning rate after warm-up, scaled by global over base batch size where one is set.

    The linear scaling rule of Goyal et al., "Accurate, large minibatch SGD", 2017, section 2.1.
    """
    if optimizer.base_batch_size is None:
        return optimizer.lr
    return optimizer.lr * global_batch_size / optimizer.base_batch_size


def lr_schedule(schedule: Schedule, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of step ``step``, from 0, as a fraction of the peak.

    Linear warm-up to 1 over ``warmup_epochs``; then constant, multiplied by ``gamma`` at each
    milestone epoch, or half a cosine down to ``final_lr`` (Loshchilov and Hutter, "SGDR", 2017).
    """
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / math.ceil(warmup)
    if schedule.name == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in schedule.milestones)
        return float(schedule.gamma**passed)
    if schedule.name == "cosine":
        progress = (step - warmup) / max(1.0, epochs * steps_per_epoch - warmup)
        return schedule.final_lr + (1 - schedule.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    return 1.0


_IN_ONE_PASS = {"sgd": momentum.SGD, "nag": momentum.NAG}


def make_optimizer(settings: Optimizer) -> mx.optimizer.Optimizer:
    """The MXNet optimizer that ``settings`` describe.

    Raises:
        ConfigError: no optimizer has that name, or it refuses an argument.
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
    if "lr_scheduler" in settings.arguments:
        raise ConfigError("optimizer.arguments has lr_scheduler; the settings of schedule do that")
    try:
        make = _IN_ONE_PASS.get(name) or functools.partial(mx.optimizer.create, name)
        _try_out(make(**{**arguments, **settings.arguments}))
        return make(**{**arguments, **settings.arguments})
    except Exception as error:  # MXNet checks some arguments nowhere, others in the first update
        lines = str(error).splitlines() or [f"{type(error).__name__} in its update of a vector"]
        raise ConfigError(f"optimizer.arguments do not fit {name}: {lines[0]}") from error


def _try_out(optimizer: mx.optimizer.Optimizer) -> None:
    """Update a vector, such as a bias is."""
    weight, gradient = mx.nd.ones(2), mx.nd.ones(2)
    mx.optimizer.get_updater(optimizer)([0], [gradient], [weight])
    weight.wait_to_read()


def make_trainer(net: gluon.Block, settings: Optimizer) -> gluon.Trainer:
    """The distributed trainer of ``net``, which must be initialised; on every rank.

    Unless asked for, gamma, beta and biases (parameters of at most one dimension) do not decay.

    Raises:
        ConfigError: the optimizer would not keep the weights of several ranks alike.
    """
    optimizer = make_optimizer(settings)
    if dist.world_size() > 1 and isinstance(optimizer, mx.optimizer.SGLD):
        raise ConfigError(
            f"optimizer.name is {settings.name}, whose noise each rank would draw for itself, so "
            "that their weights would part; train on one rank, or take another optimizer"
        )
    parameters = net.collect_params()
    for parameter in parameters.values():
        if parameter.grad_req == "null":
            continue
        if len(parameter.shape) <= 1 and not settings.decay_norm_and_bias:
            parameter.wd_mult = 0.0
        # Whatever the user or an earlier run of this net left there.
        parameter.grad_req = "add" if settings.accumulate > 1 else "write"
    trainer = dist.gluon_trainer(
        parameters,
        optimizer,
        settings.fp16_allreduce,
        settings.groups,
        settings.shared_memory,
    )
    if isinstance(optimizer, momentum.InOnePass):
        optimizer.may_wait = _waits_anyway(trainer)
    return trainer


def _waits_anyway(trainer: gluon.Trainer) -> bool:
    """Whether this process waits for backward before the update, or has one core for everything.

    Elsewhere the host enqueues the next step while the device computes.
    """
    if dist.world_size() == 1:
        return os.environ.get("OMP_NUM_THREADS") == "1"
    return dist.ranks_share_memory() and shared_gradients.used_by(trainer)


def mean_gradients(trainer: gluon.Trainer) -> Dict[str, np.ndarray]:
    """The last step's gradients of the global mean loss, after clipping, by parameter name."""
    moved = [p for p in trainer._params if p.grad_req != "null"]
    return {p.name: p.list_grad()[0].asnumpy() * trainer._scale for p in moved}


def gradients(trainer: gluon.Trainer) -> List[mx.nd.NDArray]:
    """This rank's gradient arrays, in the trainer's order."""
    return [p.list_grad()[0] for p in trainer._params if p.grad_req != "null"]


def zero_unused_gradients(trainer: gluon.Trainer) -> None:
    """Zero the gradients of parameters that this rank's forward did not use.

    Gluon would leave the last step's reduced gradient there and skip the update. Where ranks take
    different paths (layers dropped at random, branches on the data), the sum over ranks would be
    wrong and their weights would diverge.
    """
    for parameter in trainer._params:
        if parameter.grad_req == "null":
            continue
        data = parameter.list_data()[0]
        if not data._fresh_grad:
            parameter.zero_grad()
            data._fresh_grad = True


Mark = Callable[[str], None]


def unmarked(part: str) -> None:
    """The mark of a step that is not timed: does nothing."""


def apart(part: str) -> None:
    """A mark that does nothing but keep allreduce and update apart, for others to time."""


def reduce_and_update(
    trainer: gluon.Trainer, clip_norm: Optional[float], want_norm: bool, mark: Mark = unmarked
) -> Optional[mx.nd.NDArray]:
    """Average gradients over ranks, clip them, update the parameters; asynchronous.

    Returns:
        The L2 norm, before clipping, of the gradient of the global batch's mean loss, float32
        (1,) on the device, where ``want_norm`` or ``clip_norm`` asks for it. Otherwise the ranks'
        gradients may be added up in the update alone, and mean_gradients does not find them.
    """
    zero_unused_gradients(trainer)
    whole = clip_norm is None and not want_norm and mark is unmarked
    if whole and _reduce_in_update(trainer):
        return None
    trainer.allreduce_grads()
    mark("allreduce")
    norm = None
    if want_norm or clip_norm is not None:
        arrays = gradients(trainer)
        # Without NCCL Horovod leaves a sum, and _scale is 1 / world_size for the update; with it, a
        # mean, and _scale is 1. The product is the norm of the mean in either case.
        norm = _norm(arrays) * trainer._scale
        if clip_norm is not None:
            _rescale(arrays, mx.nd.minimum(clip_norm / (norm + 1e-12), 1.0))
    trainer.update(1)
    return norm


def _reduce_in_update(trainer: gluon.Trainer) -> bool:
    """Add up the gradients of ranks that share memory while updating; False if not possible."""
    optimizer = trainer.optimizer
    if not isinstance(optimizer, momentum.InOnePass):
        return False
    moved = [p for p in trainer._params if p.grad_req != "null"]
    if not optimizer.handles(*(p.list_data()[0] for p in moved)):
        return False
    rows = shared_gradients.rows(trainer)
    if rows is None:
        return False
    with rows as gradients, optimizer.adding(gradients):
        trainer.update(1)
    return True


def _norm(arrays: List[mx.nd.NDArray]) -> mx.nd.NDArray:
    """The joint L2 norm of ``arrays``, float32 (1,)."""
    if _on_host(arrays):
        mx.nd.waitall()  # NumPy must not read an array that the engine still works on
        views = map(memory_of, arrays)
        return mx.nd.array([math.sqrt(sum(float(np.vdot(view, view)) for view in views))])
    by_dtype: Dict[Any, List[mx.nd.NDArray]] = {}
    for array in arrays:  # a net cast to float16 keeps its batch norm in float32
        by_dtype.setdefault(array.dtype, []).append(array)
    squares = [mx.nd.multi_sum_sq(*alike, num_arrays=len(alike)) for alike in by_dtype.values()]
    return mx.nd.concat(*squares, dim=0).sum().sqrt()


@np.errstate(all="ignore")  # a net that diverges is reported by the metrics
def _rescale(arrays: List[mx.nd.NDArray], factor: mx.nd.NDArray) -> None:
    """Multiply ``arrays`` by ``factor``, float32 (1,), in place."""
    if not _on_host(arrays):
        for array in arrays:
            array *= factor.astype(array.dtype, copy=False)
    elif factor.asscalar() != 1:
        mx.nd.waitall()
        for view in map(memory_of, arrays):
            view *= view.dtype.type(factor.asscalar())


def _on_host(arrays: List[mx.nd.NDArray]) -> bool:
    """Whether NumPy can process ``arrays`` in place: on CPUs five times as fast as MXNet."""
    return all(dense_on_cpu(array, np.float32, np.float64) for array in arrays)


def set_lr(trainer: gluon.Trainer, config: Config, step: int, steps_per_epoch: int) -> float:
    """Set and return the learning rate of step ``step``."""
    peak = peak_lr(config.optimizer, config.train.global_batch_size)
    lr = peak * lr_schedule(config.schedule, step, steps_per_epoch, config.train.epochs)
    trainer.set_learning_rate(lr)
    return lr

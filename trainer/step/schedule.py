"""The learning rate of a step: a function of the step and, on a plateau, of the evaluations."""

from __future__ import annotations

import math

from mxnet import gluon

from ..config import Config, Optimizer, Schedule


def peak_lr(optimizer: Optimizer, global_batch_size: int) -> float:
    """The learning rate after warm-up, scaled by global over base batch size where one is set.

    The linear scaling rule of Goyal et al., "Accurate, large minibatch SGD", 2017, section 2.1.
    """
    if optimizer.base_batch_size is None:
        return optimizer.lr
    return optimizer.lr * global_batch_size / optimizer.base_batch_size


def lr_schedule(
    schedule: Schedule, step: int, steps_per_epoch: int, epochs: int, reductions: int = 0
) -> float:
    """The learning rate of step ``step``, from 0, as a fraction of the peak.

    Linear warm-up to 1 over ``warmup_epochs``; then constant, multiplied by ``gamma`` at each
    milestone epoch or each of so many ``reductions``, or down to ``final_lr`` along half a cosine
    (Loshchilov and Hutter, "SGDR", 2017) or a power. ``one_cycle`` rises along half a cosine too,
    from 1/25 (Smith and Topin, "Super-convergence", 2019, as fastai and PyTorch have it; momentum
    stays as it is).
    """
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup and schedule.name == "one_cycle":
        return 1 - (1 - 1 / 25) * (1 + math.cos(math.pi * step / warmup)) / 2
    if step < warmup:
        return (step + 1) / math.ceil(warmup)
    if schedule.name == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in schedule.milestones)
        return float(schedule.gamma**passed)
    if schedule.name == "plateau":
        return max(float(schedule.gamma**reductions), schedule.final_lr)
    # A benchmark may take more steps than the run, all of which may be warm-up.
    progress = min(1.0, (step - warmup) / max(1, epochs * steps_per_epoch - warmup))
    left = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "one_cycle": (1 + math.cos(math.pi * progress)) / 2,
        "poly": (1 - progress) ** schedule.power,
    }
    return schedule.final_lr + (1 - schedule.final_lr) * left.get(schedule.name, 1.0)


def set_lr(
    trainer: gluon.Trainer, config: Config, step: int, steps_per_epoch: int, reductions: int = 0
) -> float:
    """Set and return the learning rate of step ``step``."""
    peak = peak_lr(config.optimizer, config.train.global_batch_size)
    epochs = config.train.epochs
    lr = peak * lr_schedule(config.schedule, step, steps_per_epoch, epochs, reductions)
    trainer.set_learning_rate(lr)
    return lr

"""The learning rate of a step: a pure function of the step."""

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


def set_lr(trainer: gluon.Trainer, config: Config, step: int, steps_per_epoch: int) -> float:
    """Set and return the learning rate of step ``step``."""
    peak = peak_lr(config.optimizer, config.train.global_batch_size)
    lr = peak * lr_schedule(config.schedule, step, steps_per_epoch, config.train.epochs)
    trainer.set_learning_rate(lr)
    return lr

"""Checks that involve several settings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Sequence, Tuple

from ..errors import ConfigError, show

if TYPE_CHECKING:
    from .schema import Config


def check(config: Config) -> None:
    """Refuse settings that cannot be combined. Raises ConfigError: naming them."""
    schedule, train = config.schedule, config.train
    if schedule.warmup_epochs > train.epochs:
        raise ConfigError(
            f"schedule.warmup_epochs is {schedule.warmup_epochs:g}; "
            f"it must be at most train.epochs, {train.epochs}"
        )
    for setting, patience in config.patient.items():
        if patience is not None and config.evaluate.every_epochs == 0:
            raise ConfigError(
                f"{setting} is {patience}, and evaluate.every_epochs=0 evaluates only at the end; "
                f"set evaluate.every_epochs=1, or {setting}=null"
            )
    needed: Sequence[Tuple[str, str, Any, str]] = (
        ("step", "milestones", list(schedule.milestones), "[30, 60]"),
        ("plateau", "patience", schedule.patience, "3"),
        ("one_cycle", "warmup_epochs", schedule.warmup_epochs, "a third of train.epochs"),
    )
    for name, leaf, value, example in needed:
        if schedule.name == name and not value:
            raise ConfigError(
                f"schedule.name is {name}; schedule.{leaf} must say when, e.g. {example}"
            )
        if schedule.name != name and value and leaf != "warmup_epochs":
            raise ConfigError(
                f"schedule.{leaf} is {value}; it goes with schedule.name={name}, not "
                f"{schedule.name}"
            )
    if list(schedule.milestones) != sorted(set(schedule.milestones)):
        raise ConfigError(
            f"schedule.milestones is {list(schedule.milestones)}; they must rise, none twice"
        )
    for pattern, factor in config.optimizer.lr_mult.items():
        if type(factor) not in (int, float) or factor < 0:
            raise ConfigError(
                f"optimizer.lr_mult[{pattern!r}] is {show(factor)}; it must be a number from 0"
            )
    if config.optimizer.nesterov and config.optimizer.name != "sgd":
        raise ConfigError(
            f"optimizer.nesterov goes with optimizer.name=sgd, not {config.optimizer.name}"
        )
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", config.model.factory):
        raise ConfigError(
            f"model.factory is {config.model.factory!r}; it must read package.module:function"
        )
    if not config.name or "/" in config.name or config.name in (".", "..") or "\0" in config.name:
        raise ConfigError(f"name is {config.name!r}; it must be the name of a folder, without /")

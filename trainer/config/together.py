"""Checks that involve several settings."""

from __future__ import annotations

import json
import operator
import re
from typing import TYPE_CHECKING, Dict, Tuple

from ..errors import ConfigError, show
from .data_settings import PICTURES

if TYPE_CHECKING:
    from .schema import Config

# Settings that act only where another one has one of these values.
ONLY_WITH: Dict[str, Tuple[str, ...]] = {
    "schedule.milestones": ("schedule.name", "step"),
    "schedule.patience": ("schedule.name", "plateau"),
    "schedule.gamma": ("schedule.name", "step", "plateau"),
    "schedule.final_lr": ("schedule.name", "cosine", "poly", "one_cycle", "plateau"),
    "schedule.power": ("schedule.name", "poly"),
    "optimizer.nesterov": ("optimizer.name", "sgd"),
    "optimizer.momentum": ("optimizer.name", "sgd", "nag"),
    "data.crop_area": ("data.random_crop", "true"),
    **dict.fromkeys(
        ("data.channels", "data.resize", "data.random_crop", "data.color_jitter"),
        ("data.dataset", *PICTURES),
    ),
}


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
    for name, leaf, example in (
        ("step", "milestones", "[30, 60]"),
        ("plateau", "patience", "3"),
        ("one_cycle", "warmup_epochs", "a third of train.epochs"),
    ):
        if schedule.name == name and not getattr(schedule, leaf):
            raise ConfigError(f"schedule.name is {name}; set schedule.{leaf}, e.g. {example}")
    for name, (other, *values) in ONLY_WITH.items():
        section, leaf = name.split(".")
        default = getattr(type(getattr(config, section)), leaf)
        given, actual = (operator.attrgetter(n)(config) for n in (name, other))
        if given and given != default and str(actual).lower() not in values:
            raise ConfigError(
                f"{name} is {json.dumps(given)}; it goes with {other}={' or '.join(values)}, not "
                f"{str(actual).lower()}; leave it out, or give {name}={json.dumps(default)}"
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
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", config.model.factory):
        raise ConfigError(
            f"model.factory is {config.model.factory!r}; it must read package.module:function"
        )
    if not config.name or "/" in config.name or config.name in (".", "..") or "\0" in config.name:
        raise ConfigError(f"name is {config.name!r}; it must be the name of a folder, without /")

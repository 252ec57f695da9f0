"""Refuses ranks that were given different settings, whose weights would diverge without a sign."""

from __future__ import annotations

import re

from . import dist, launched
from .config import Config, to_dict
from .settings import ConfigError, flat, show

# A rank's own affair: where it reads and writes, and what changes neither results nor collectives.
_OWN = re.compile(
    r"output|name|device|data\.(folder|prefetch)|evaluate\.batch_size|train\.watchdog_seconds"
)
_SHOWN = 3


def check(config: Config) -> None:
    """Refuse configs that differ between ranks; collective.

    A file that was changed on one node only makes them differ, or a seed or a learning rate
    computed from the rank.

    Raises:
        ConfigError: on every rank, naming the settings, their values and the ranks.
    """
    own = {name: show(value) for name, value in flat(to_dict(config)).items()}
    found = dist.gather_objects((own, launched.where()))
    first, place = found[0]
    for other, elsewhere in found[1:]:
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        differing = [
            f"{name} is {first.get(name)} on {place}, {other.get(name)} on {elsewhere}"
            for name in names
            if not _OWN.fullmatch(name)
        ]
        if differing:
            raise ConfigError(
                f"the ranks have different settings: {'; '.join(differing[:_SHOWN])}; give each "
                "the same config: samples, augmentation and dropout differ between ranks as it is"
            )

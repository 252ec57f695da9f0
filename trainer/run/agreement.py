"""Refuses ranks that were given different settings, whose weights would diverge without a sign."""

from __future__ import annotations

import hashlib
import re

from .. import dist
from ..config import Config, to_dict
from ..config.settings import flat
from ..data.arrays import Arrays
from ..data.idx_file import DataError
from ..dist import environment
from ..errors import ConfigError, show

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
    found = dist.gather_objects((own, environment.where()))
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


def check_alike(train: Arrays, test: Arrays) -> None:
    """Refuse sets that differ between ranks, which would diverge or deadlock; collective.

    Raises:
        DataError: on every rank.
    """
    digest = hashlib.sha256(train[1].tobytes() + test[1].tobytes()).hexdigest()
    sizes = f"{len(train[1])} training and {len(test[1])} test images"
    found = dist.gather_objects((digest, f"{sizes} on {environment.where()}"))
    other = next((which for digest, which in found if digest != found[0][0]), None)
    if other is not None:
        raise DataError(
            f"the ranks have different sets, or labels in another order: {found[0][1]}, {other}; "
            "give each the whole set, as fit makes shards itself"
        )

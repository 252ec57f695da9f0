"""Starts a net from a ``.params`` file: of a model zoo, or saved by ``net.save_parameters``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, List

import mxnet as mx
from mxnet import gluon

from .. import mxnet_internals
from ..errors import ConfigError
from . import params_file

_SHOWN = 4  # names in a message


def load(path: Path, net: gluon.Block) -> List[str]:
    """Give ``net``, which is initialised, the weights in a file; returns what to tell of the rest.

    Names are those of ``save_parameters`` (by structure) or of ``export`` and ``collect_params``
    (by prefix). Parameters that the file lacks, or holds in another shape, stay as they are drawn.

    Raises:
        ConfigError: the file cannot be read, or fits nothing.
    """
    found = _arrays(path)
    own = mxnet_internals.structural_parameters(net)
    if not own.keys() & found.keys():  # by prefix: resnetv20_conv0_weight
        # No paths: characters are what is compared.
        common = os.path.commonprefix(list(found)) if len(found) > 1 else ""  # noqa: RUF071
        common = common[: common.rfind("_") + 1]
        found = {name[len(common) :]: array for name, array in found.items()}
        own = {p.name[len(net.prefix) :]: p for p in own.values()}
    loaded = [name for name in own if name in found and found[name].shape == own[name].shape]
    if not loaded:
        raise ConfigError(
            f"model.weights is {path}, which holds no parameter of this net: it has "
            f"{_listed(sorted(found))}, the net {_listed(sorted(own))}"
        )
    for name in loaded:
        own[name].set_data(found[name].astype(own[name].dtype))
    others = [
        f"{name} {found[name].shape} -> {own[name].shape}"
        for name in own
        if name in found and name not in loaded
    ]
    notes = {
        "of another shape, so drawn anew": others,
        "not in the file, so drawn anew": [name for name in own if name not in found],
        "in the file alone": [name for name in found if name not in own],
    }
    told = [f"{meaning}: {_listed(names)}" for meaning, names in notes.items() if names]
    return [f"model.weights: {len(loaded)} of {len(own)} parameters are from {path}", *told]


def _arrays(path: Path) -> Dict[str, mx.nd.NDArray]:
    try:
        wrong = params_file.problem(path)
    except OSError as error:
        wrong = f"it cannot be read: {error.strerror}"
    if wrong is not None:
        raise ConfigError(f"model.weights is {path}; {wrong}")
    arrays = mx.nd.load(str(path))
    return {name.split(":", 1)[-1]: array for name, array in arrays.items()}  # arg: and aux:


def _listed(names: List[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

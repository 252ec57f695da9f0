"""The mean of the weights of several checkpoints of one run, or of runs of one net.

Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018.
"""

from __future__ import annotations

from pathlib import Path
from typing import Sequence, Tuple

import mxnet as mx
import numpy as np

from .. import checkpoint
from ..mxnet_internals import structural_parameters
from .trained_model import Saved


def average(saved: Saved, paths: Sequence[Path]) -> None:
    """Give the net of ``saved`` the mean over the checkpoints at ``paths``, in float64.

    Running statistics too, which ``calibrate`` recomputes for the mean. CheckpointError names one
    that is damaged, or of another net, or whose classes are other ones.
    """
    named = structural_parameters(saved.net)
    sums = {name: np.zeros(parameter.shape) for name, parameter in named.items()}
    for path in paths:
        wrong = checkpoint.problem(path)
        if wrong is not None:
            raise checkpoint.CheckpointError(f"{wrong}; leave it out")
        for what, found, first in zip(("net", "classes"), _made_for(path), _made_for(saved.path)):
            if found != first:
                raise checkpoint.CheckpointError(
                    f"{path} has another {what} than {saved.path}: {found}, {first}; leave it out"
                )
        checkpoint.load_parameters(path, saved.net)
        for name, parameter in named.items():
            sums[name] += parameter.data().asnumpy()
    for name, parameter in named.items():
        mean = (sums[name] / len(paths)).astype(parameter.dtype)
        parameter.set_data(mx.nd.array(mean, dtype=mean.dtype))


def _made_for(path: Path) -> Tuple[str, str]:
    """Net and classes of a checkpoint: weights of the same shapes may be of others."""
    state = checkpoint.read_state(path)
    model = state.config["model"]
    net = f"{model['factory']} {model.get('arguments', {})}"
    return net, ", ".join(map(str, state.class_names or ()))


def checkpoints(where: Sequence[str]) -> Sequence[Path]:
    """The checkpoints at ``where``, and those kept of each run's folder; at least two.

    Fewer are refused by CheckpointError.
    """
    found = []
    for place in map(Path, where):
        found += checkpoint.listing(place / "checkpoints") or [place]
    if len(found) < 2:
        raise checkpoint.CheckpointError(
            f"{found[0]} is one checkpoint; name two or more, or a run's folder that keeps some "
            "(checkpoint.keep)"
        )
    return found

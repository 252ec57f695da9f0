"""What a run is made of, by digest: it must be alike on all ranks, and the same on a resume.

Ranks with other settings, images or nets would diverge without a sign, and so would a run that
resumes on them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import types
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import dist, mxnet_internals
from ..config import Config, to_dict
from ..config.settings import flat
from ..data.idx_file import DataError
from ..data.input_pipeline import Sets
from ..dist import environment
from ..dist.device import pci_address
from ..errors import ConfigError, show
from ..step.loss import Loss

# A rank's own affair: where it reads and writes, and what changes neither results nor collectives.
_OWN = re.compile(
    r"output|name|device|data\.(folder|workers|prefetch)|evaluate\.batch_size|train\.watchdog_seconds"
)
_SHOWN = 3

Digests = Dict[str, str]  # by what they are of, in words for a message
Checksums = Dict[str, int]  # of arrays, by structural name


def of_data(sets: Sets) -> Digests:
    """Digests of the images and the labels of each set."""
    return {
        f"{name} {what}": digest
        for name, source in sets.named.items()
        for what, digest in source.digests().items()
    }


def of_net(net: gluon.Block) -> Digests:
    """The digest of the net's parameters: names, shapes, types, and which are trained."""
    return {"net": hashlib.blake2b("\n".join(_structure(net)).encode(), digest_size=16).hexdigest()}


def of_loss(loss: Optional[Loss]) -> Digests:
    """The digest of a loss given to ``fit``: its code, and what it holds; {} without."""
    return {} if loss is None else {"loss": hashlib.blake2b(_said(loss).encode()).hexdigest()[:32]}


def of_weights(sums: Checksums) -> str:
    """The digest of a net's weights, from their :func:`checksums`."""
    return hashlib.blake2b(repr(sorted(sums.items())).encode(), digest_size=16).hexdigest()


def of_initial_weights(net: gluon.Block, file: Optional[str] = None) -> Digests:
    """The digest of ``model.weights`` or of what a net was given; {} unless all weights are."""
    if file is not None:  # where rank 0 has it; a run that resumes can do without
        content = Path(file).read_bytes() if Path(file).is_file() else b""
        return {"initial weights": hashlib.blake2b(content).hexdigest()[:32]} if content else {}
    try:
        return {"initial weights": of_weights(checksums(net))}
    except (RuntimeError, gluon.parameter.DeferredInitializationError):
        return {}


def checksums(net: gluon.Block) -> Checksums:
    """A checksum of each of the net's weights, without running statistics, by structural name."""
    mx.nd.waitall()  # oneDNN reorders weights in place during a forward
    named = mxnet_internals.structural_parameters(net).items()
    weights = {name: p for name, p in named if not mxnet_internals.is_statistic(p)}
    # Below 2**56, so that a sum with zeros is exact whatever adds it up.
    digest = functools.partial(hashlib.blake2b, digest_size=7)
    return {
        name: int.from_bytes(digest(weights[name].data().asnumpy().tobytes()).digest(), "big")
        for name in sorted(weights)
    }


def check(config: Config) -> None:
    """Refuse configs that differ between ranks; collective.

    A file that was changed on one node only makes them differ, or a seed or a learning rate
    computed from the rank.

    Raises:
        ConfigError: on every rank, naming the settings, their values and the ranks.
    """
    own = {name: show(value) for name, value in flat(to_dict(config)).items()}
    for first, place, other, elsewhere in _beside_the_first(own):
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


def check_devices(context: mx.Context) -> None:
    """Refuse ranks that are on one GPU, and those of which some are on CPUs; collective.

    Raises:
        ConfigError: on every rank.
    """
    told = dist.gather_objects(
        (context.device_type, environment.hostname(), pci_address(context), environment.where())
    )
    on: Dict[Any, str] = {}
    for kind, host, gpu, where in told:
        if kind != told[0][0]:
            raise ConfigError(
                f"{told[0][3]} is on the {told[0][0]} and {where} on the {kind}; make a GPU "
                "visible to each rank, or set device=cpu"
            )
        other = on.setdefault((host, gpu), where) if gpu else where
        if other != where:
            raise ConfigError(
                f"{other} and {where} are on the same GPU, {gpu}, which NCCL refuses, also for two "
                "MIG slices of it; start one rank per GPU, and look at CUDA_VISIBLE_DEVICES"
            )


def check_sets(own: Digests, sizes: Mapping[str, int]) -> None:
    """Refuse ranks that have other images, labels or losses; collective.

    Weights may differ: all ranks get those of rank 0. For nets see :func:`check_net`.

    Args:
        sizes: images in each set, for a message.

    Raises:
        DataError: on every rank.
    """
    held = f"{' and '.join(f'{size} {name}' for name, size in sizes.items())} images"
    for (first, here), place, (other, there), elsewhere in _beside_the_first((own, held)):
        compared = [n for n in {**first, **other} if n not in ("net", "initial weights")]
        differing = [name for name in compared if first.get(name) != other.get(name)]
        if differing:
            raise DataError(
                f"the ranks have different {', '.join(differing)}: {here} on {place}, {there} on "
                f"{elsewhere}; give each rank the whole set, in the same order, and the same loss, "
                "as fit makes shards itself; transforms may draw from random, numpy.random and "
                "mxnet.random, not from generators of their own"
            )


def check_net(net: gluon.Block) -> None:
    """Refuse nets whose parameters differ between ranks, naming the first; collective.

    Raises:
        ConfigError: on every rank.
    """
    for first, place, other, elsewhere in _beside_the_first(_structure(net)):
        for index in range(max(len(first), len(other))):
            here, there = ("".join(lines[index : index + 1]) for lines in (first, other))
            if here != there:
                raise ConfigError(
                    f"the ranks have different nets: {here or 'no more parameters'} on {place}, "
                    f"{there or 'no more parameters'} on {elsewhere}; make the same net on each"
                )


def parted(sums: Checksums) -> Optional[str]:
    """Where the ranks' weights differ, in words; None while they are alike; collective.

    Args:
        sums: the :func:`checksums` of this rank's net.
    """
    table = np.zeros((dist.world_size(), len(sums)), np.int64)
    table[dist.rank()] = list(sums.values())
    table = dist.allreduce_sum(table, "weights")
    ranks, places = np.nonzero(table != table[0])
    if not len(ranks):
        return None
    first = places.argmin()
    return f"{list(sums)[places[first]]} on rank {ranks[first]} is not that of rank 0"


def _beside_the_first(own: Any) -> Any:
    """(rank 0's value, its place, another's, its place) for each other rank; collective."""
    (first, place), *others = dist.gather_objects((own, environment.where()))
    return [(first, place, other, elsewhere) for other, elsewhere in others]


def _structure(net: gluon.Block) -> List[str]:
    """A line for each of the net's parameters, sorted by structural name."""
    first: Dict[int, str] = {}  # name of a parameter that layers share
    return [
        f"{name} {parameter.shape} {np.dtype(parameter.dtype).name}"
        f"{', trained' if parameter.grad_req != 'null' else ''}"
        f"{f', that of {shared}' if shared != name else ''}"
        for name, parameter in sorted(mxnet_internals.structural_parameters(net).items())
        for shared in (first.setdefault(id(parameter), name),)
    ]


def _said(what: Any, within: Tuple[int, ...] = ()) -> str:
    """A text that tells functions and objects of other behaviour apart, whatever the process."""
    if isinstance(what, (int, float, str, bytes, np.generic, type(None))) or id(what) in within:
        return repr(what) if id(what) not in within else "itself"
    said = functools.partial(_said, within=(*within, id(what)))
    if isinstance(what, (mx.nd.NDArray, np.ndarray)):
        content = what if isinstance(what, np.ndarray) else what.asnumpy()
        digest = hashlib.blake2b(content.tobytes(), digest_size=16).hexdigest()
        return f"{content.dtype} {content.shape} {digest}"
    if isinstance(what, (tuple, list)):
        return f"[{', '.join(map(said, what))}]"
    if isinstance(what, dict):
        return f"{{{', '.join(sorted(f'{said(key)}: {said(v)}' for key, v in what.items()))}}}"
    if isinstance(what, functools.partial):
        return f"{said(what.func)} {said(what.args)} {said(what.keywords)}"
    if isinstance(what, types.MethodType):
        return f"{said(what.__func__)} of {said(what.__self__)}"
    if isinstance(what, types.FunctionType):
        return _code_said(what.__qualname__, what.__code__) + "".join(map(said, _held_by(what)))
    if isinstance(what, (type, types.ModuleType)):
        return f"{getattr(what, '__module__', '')}.{what.__name__}"
    return _object_said(what, said)


def _held_by(function: types.FunctionType) -> List[Any]:
    """What a function brings along: its defaults, and the variables around it."""
    around = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # it has no value yet
            around[name] = cell.cell_contents
    return [held for held in (function.__defaults__, function.__kwdefaults__, around) if held]


def _code_said(name: str, code: types.CodeType) -> str:
    plain = [c for c in code.co_consts if isinstance(c, (int, float, str, tuple, type(None)))]
    inner = [_code_said("", c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return f"{name} {code.co_code.hex()} {code.co_names} {plain[1:]}{''.join(inner)}"


def _object_said(what: Any, said: Callable[[Any], str]) -> str:
    """Of an object: its class, with the code of one that is not MXNet's, and what it holds."""
    kind = type(what)
    ignored = vars(gluon.Block()) if isinstance(what, gluon.Block) else {}
    held = {k: v for k, v in getattr(what, "__dict__", {}).items() if k not in ignored}
    kept = (int, float, str, tuple, list, mx.nd.NDArray, np.ndarray)
    shown = sorted((name, said(value)) for name, value in held.items() if isinstance(value, kept))
    forward = [getattr(kind, name, None) for name in ("__call__", "forward", "hybrid_forward")]
    own = [f for f in forward if not getattr(f, "__module__", "mxnet").startswith("mxnet.")]
    return f"{kind.__module__}.{kind.__qualname__} {shown}{''.join(map(said, own))}"

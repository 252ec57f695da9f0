"""What a run is made of, by digest: it must be alike on all ranks, and the same on a resume.

Ranks with other settings, images or nets would diverge without a sign, and so would a run that
resumes on them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import dist, mxnet_internals
from ..checkpoint.state import same_answers
from ..config import Config, to_dict
from ..config.settings import flat
from ..console import version
from ..data.idx_file import DataError
from ..data.input_pipeline import Sets
from ..dist import environment
from ..dist.device import pci_address
from ..errors import ConfigError, show
from ..model import users_net
from ..step.loss import Loss
from .code_digest import digest, said_of

# A rank's own affair: where it reads and writes, and what changes neither results nor collectives.
_OWN = re.compile(
    r"output|name|device|data\.(folder|workers|prefetch)|evaluate\.batch_size|train\.watchdog_seconds"
)
_SHOWN = 3
_SOURCES = Path(__file__).parents[1]
_NET, _LAYERS, _WEIGHTS = "net", "layers or multipliers", "initial weights"

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
    """The digests of the net's parameters (names, shapes, types, which are trained), and of what
    no parameter or score shows: Gluon's layers as they tell themselves, and multipliers."""
    parts = {_NET: users_net.structure(net), _LAYERS: users_net.settings(net)}
    return {name: digest("\n".join(lines).encode()) for name, lines in parts.items()}


def of_loss(loss: Optional[Loss], net: Optional[gluon.Block] = None) -> Digests:
    """The digest of a loss: its code, what it holds and uses, but of the ``net``; {} without."""
    own = () if net is None else (net, *mxnet_internals.every_parameter(net))
    known = {id(part): (part, "the net's") for part in own}
    return {} if loss is None else {"loss": digest(said_of(loss, known).encode())}


def of_weights(sums: Checksums) -> str:
    """The digest of a net's weights, from their :func:`checksums`."""
    return digest(repr(sorted(sums.items())).encode())


def of_initial_weights(net: gluon.Block, file: Optional[str] = None) -> Digests:
    """The digest of ``model.weights``, or of those that a net was given, be it a part of them."""
    if file is not None:  # where rank 0 has it; a run that resumes can do without
        readable = os.path.isfile(file) and os.access(file, os.R_OK)
        content = Path(file).read_bytes() if readable else b""
        return {_WEIGHTS: hashlib.blake2b(content).hexdigest()[:32]} if content else {}
    sums = checksums(net)
    return {_WEIGHTS: of_weights(sums)} if sums else {}


def checksums(net: gluon.Block) -> Checksums:
    """A checksum of each weight that is initialised, by structural name; no running statistics."""
    mx.nd.waitall()  # oneDNN reorders weights in place during a forward
    # Below 2**56, so that a sum with zeros is exact whatever adds it up.
    digest = functools.partial(hashlib.blake2b, digest_size=7)
    return {
        name: int.from_bytes(digest(parameter.data().asnumpy().tobytes()).digest(), "big")
        for name, parameter in sorted(mxnet_internals.structural_parameters(net).items())
        if mxnet_internals.is_initialised(parameter) and not mxnet_internals.is_statistic(parameter)
    }


def check(config: Config) -> None:
    """Refuse configs, and code of this package, that differ between ranks; collective.

    A file that was changed on one node only makes them differ, or a seed or a learning rate
    computed from the rank. ConfigError, on every rank, names settings, values and ranks.
    """
    own = {name: show(value) for name, value in flat(to_dict(config)).items()}
    own.update({"MXNet's version": mx.__version__, "the trainer's code": _own_code()})
    for first, place, other, elsewhere in _beside_the_first(own):
        differing = [
            f"{name} is {first.get(name)} on {place}, {other.get(name)} on {elsewhere}"
            for name in {**first, **other}
            if first.get(name) != other.get(name) and not _OWN.fullmatch(name)
        ]
        if differing:
            raise ConfigError(
                f"the ranks have different settings: {'; '.join(differing[:_SHOWN])}; give each "
                "the same config and the same installation: samples, augmentation and dropout "
                "differ between ranks as it is"
            )


def _own_code() -> str:
    """The version of this package, and a digest of its sources: one node may have older ones."""
    sources = sorted(p for p in _SOURCES.rglob("*") if p.suffix in (".py", ".cc", ".h"))
    return f"{version()} ({digest(b''.join(path.read_bytes() for path in sources))[:8]})"


def check_devices(context: mx.Context) -> None:
    """Refuse ranks on one GPU, or some of them on CPUs, by a ConfigError on each; collective."""
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
                "MIG slices of it; start one rank per GPU, look at CUDA_VISIBLE_DEVICES, and give "
                "train_ch5 ctx=mx.gpu(dist.local_rank())"
            )


def check_sets(own: Digests, sizes: Mapping[str, int]) -> None:
    """Refuse ranks that have other images, labels or losses, by a DataError on each; collective.

    Weights may differ: all ranks get those of rank 0. For nets see :func:`check_net`. A message
    tells ``sizes``, the number of images in each set.
    """
    held = f"{' and '.join(f'{size} {name}' for name, size in sizes.items())} images"
    for (first, here), place, (other, there), elsewhere in _beside_the_first((own, held)):
        compared = [n for n in {**first, **other} if n not in (_NET, _LAYERS, _WEIGHTS)]
        differing = [name for name in compared if first.get(name) != other.get(name)]
        if differing:
            raise DataError(
                f"the ranks have different {', '.join(differing)}: {here} on {place}, {there} on "
                f"{elsewhere}; give each rank the whole set, in the same order, and the same loss, "
                "as fit makes shards itself; transforms may draw from random, numpy.random and "
                "mxnet.random, and generators that the dataset holds"
            )


def check_net(net: gluon.Block) -> None:
    """Refuse nets whose parameters, multipliers or Gluon's layers differ; collective.

    ConfigError, on every rank, names the first that does.
    """
    own = [*users_net.structure(net), *users_net.settings(net)]
    for first, place, other, elsewhere in _beside_the_first(own):
        for here, there in itertools.zip_longest(first, other, fillvalue="no more parameters"):
            if here != there:
                raise ConfigError(
                    f"the ranks have different nets: {here} on {place}, {there} on {elsewhere}; "
                    "make the same net on each"
                )


def check_answers(answers: Sequence[float]) -> None:
    """Refuse nets that with the same weights have other ``prepare.answers``; collective."""
    for first, place, other, elsewhere in _beside_the_first(list(answers)):
        if first and other and not same_answers(other, first):  # without any they are drawn
            raise ConfigError(
                f"the ranks' nets compute different functions: with the same weights and image "
                f"that on {elsewhere} gives other scores than that on {place}; give each the same "
                "code, and make what it draws a parameter, as by params.get_constant(name, value), "
                "of which all get rank 0's"
            )


def parted(sums: Checksums) -> Optional[str]:
    """Where the ranks' :func:`checksums` differ, in words; None while they do not; collective."""
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

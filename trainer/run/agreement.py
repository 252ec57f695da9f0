"""What a run is made of, by digest: it must be alike on all ranks, and the same on a resume.

Ranks with other settings, images or nets would diverge without a sign, and so would a run that
resumes on them.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import itertools
import re
import sysconfig
import types
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

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
from ..model import users_net
from ..step.loss import Loss

# A rank's own affair: where it reads and writes, and what changes neither results nor collectives.
_OWN = re.compile(
    r"output|name|device|data\.(folder|workers|prefetch)|evaluate\.batch_size|train\.watchdog_seconds"
)
_SHOWN = 3
_NET, _LAYERS, _WEIGHTS = "net", "layers or multipliers", "initial weights"
# The global variables that functions in these read are no part of a loss.
_LIBRARIES = (
    str(Path(__file__).parents[1]),
    *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")),
)
_TOLERANCE = 0.02  # of the largest score: ranks may have processors of other kinds

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
    return {name: _digest("\n".join(lines).encode()) for name, lines in parts.items()}


def of_loss(loss: Optional[Loss], net: Optional[gluon.Block] = None) -> Digests:
    """The digest of a loss: its code, what it holds and uses, but of the ``net``; {} without."""
    own = () if net is None else (net, *mxnet_internals.every_parameter(net))
    known = {id(part): (part, "the net's") for part in own}
    return {} if loss is None else {"loss": _digest(_said(loss, known).encode())}


def of_weights(sums: Checksums) -> str:
    """The digest of a net's weights, from their :func:`checksums`."""
    return _digest(repr(sorted(sums.items())).encode())


def of_initial_weights(net: gluon.Block, file: Optional[str] = None) -> Digests:
    """The digest of ``model.weights``, or of those that a net was given, be it a part of them."""
    if file is not None:  # where rank 0 has it; a run that resumes can do without
        content = Path(file).read_bytes() if Path(file).is_file() else b""
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
    """Refuse configs that differ between ranks; collective.

    A file that was changed on one node only makes them differ, or a seed or a learning rate
    computed from the rank. ConfigError, on every rank, names settings, values and ranks.
    """
    own = {name: show(value) for name, value in flat(to_dict(config)).items()}
    for first, place, other, elsewhere in _beside_the_first(own):
        differing = [
            f"{name} is {first.get(name)} on {place}, {other.get(name)} on {elsewhere}"
            for name in {**first, **other}
            if first.get(name) != other.get(name) and not _OWN.fullmatch(name)
        ]
        if differing:
            raise ConfigError(
                f"the ranks have different settings: {'; '.join(differing[:_SHOWN])}; give each "
                "the same config: samples, augmentation and dropout differ between ranks as it is"
            )


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
                "mxnet.random, not from generators of their own"
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
        if first and other:  # else they are drawn
            atol = _TOLERANCE * np.abs(first).max()
            if len(first) != len(other) or not np.allclose(other, first, rtol=0, atol=atol):
                raise ConfigError(
                    f"the ranks' nets compute different functions: with the same weights and image "
                    f"that on {elsewhere} gives other scores than that on {place}; give each the "
                    "same code, and make what it draws a parameter, as by params.get_constant(name,"
                    " value), of which all get rank 0's"
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


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _said(what: Any, known: Dict[int, Tuple[Any, str]]) -> str:
    """A text that tells functions and objects of other behaviour apart, whatever the process.

    ``known`` are those that have been met, each with its text, by id.
    """
    if isinstance(what, (int, float, complex, str, bytes, range, slice, np.generic, type(None))):
        return repr(what)
    if id(what) not in known:
        known[id(what)] = what, "itself"
        text = _content(what, functools.partial(_said, known=known))
        known[id(what)] = what, _digest(text.encode())
    return known[id(what)][1]


def _content(what: Any, said: Callable[[Any], str]) -> str:
    if isinstance(what, gluon.Parameter):
        what = what.list_data()[0] if mxnet_internals.is_initialised(what) else what.shape
    if isinstance(what, (mx.nd.NDArray, np.ndarray)):
        content = what if isinstance(what, np.ndarray) else what.asnumpy()
        return f"{content.dtype} {content.shape} {_digest(content.tobytes())}"
    if isinstance(what, (tuple, list, set, frozenset, dict)):
        texts = [said(each) for each in (what.items() if isinstance(what, dict) else what)]
        return f"{texts if isinstance(what, (tuple, list)) else sorted(texts)}"
    if isinstance(what, functools.partial):
        return f"{said(what.func)} {said(what.args)} {said(what.keywords)}"
    if isinstance(what, types.MethodType):
        return f"{said(what.__func__)} of {said(what.__self__)}"
    return (_function_said if isinstance(what, types.FunctionType) else _object_said)(what, said)


def _function_said(what: Any, said: Callable[[Any], str]) -> str:
    """Its code, without a docstring, its defaults, and the variables that it reads.

    Global ones too, unless it is a library's. Of a module, or what else cannot be called, only what
    it names: a script's settings are more than its loss.
    """
    codes: List[Any] = [what.__code__]
    for code in codes:
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    steps = [step for code in codes for step in dis.get_instructions(code)]
    read = {s.argval for s in steps if s.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    around = {} if _is_library(what) else {n: what.__globals__.get(n) for n in sorted(read)}
    for name, cell in zip(what.__code__.co_freevars, what.__closure__ or ()):
        with contextlib.suppress(ValueError):  # it has no value yet
            around[name] = cell.cell_contents
    names = {s.argval for s in steps if s.opname in ("LOAD_ATTR", "LOAD_METHOD")}
    for name, value in around.items():
        held = getattr(value, "__dict__", {})
        if held and not callable(value) and not isinstance(value, gluon.Parameter):
            around[name] = type(value), {n: held[n] for n in sorted(held.keys() & names)}
    text = [
        f"{s.opname} {said(s.arg if 'FAST' in s.opname else s.argval)}"  # local ones have any name
        for s in steps
        if not isinstance(s.argval, types.CodeType)
    ]
    return f"{what.__qualname__} {text} {said((what.__defaults__, what.__kwdefaults__, around))}"


def _object_said(what: Any, said: Callable[[Any], str]) -> str:
    """Of a class or an object: names, the functions that are no library's, and what it holds."""
    kind = what if isinstance(what, type) else type(what)
    every = {n: f for base in reversed(kind.__mro__) for n, f in vars(base).items()}
    functions = {n: f for n, f in every.items() if isinstance(f, types.FunctionType)}
    own = {name: function for name, function in functions.items() if not _is_library(function)}
    parts: Any = ()
    if kind is not what and (own or callable(what)):  # a lock or a logger computes nothing
        inside = mxnet_internals.children(what) if isinstance(what, gluon.Block) else []
        ignored = vars(gluon.HybridBlock()) if isinstance(what, gluon.Block) else {}
        held = getattr(what, "__dict__", {}).items()
        parts = {name: value for name, value in held if name not in ignored}, inside
    name = getattr(what, "__name__", "")
    return f"{kind.__module__}.{kind.__qualname__} {name} {said(own)} {said(parts)}"


def _is_library(function: types.FunctionType) -> bool:
    return str(function.__globals__.get("__file__")).startswith(_LIBRARIES)

"""The global generators of Python, NumPy and MXNet: seeded for a step, and given back as they were.

A step's random numbers (dropout, a user's own draws in a forward) depend on (seed, step, rank)
alone, so that a resumed run repeats them. The trainer itself draws from generators of its own.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import sys
import types
from typing import Any, Callable, Dict, Iterator, List, Sequence

import mxnet as mx
import numpy as np

from . import sharding

_PARTS = 1000  # of a list or a dict that are looked through: of transforms there are few
_OF_MODULES = (("torch", "manual_seed"), ("cv2", "setRNGSeed"))  # those of other libraries


def seed_all(seed: int, mxnet: bool = True) -> None:
    """Seed the three generators; ``seed`` is below 2**31.

    ``mxnet=False`` leaves out MXNet's, which is a thousand of them, and takes milliseconds.
    """
    random.seed(seed)
    np.random.seed(seed)
    if mxnet:
        mx.random.seed(seed)


def held(value: Any) -> List[Any]:
    """NumPy's and Python's generators that an object, and whatever it refers to, holds.

    Always in the same order. Those of modules and classes are not found.
    """
    found: List[Any] = []
    seen: Dict[int, Any] = {}  # by number, and kept, so that nothing else gets it
    left = [value]
    while left:
        part = left.pop()
        kind = type(part)
        if id(part) in seen or issubclass(kind, (type, types.ModuleType)):
            continue
        seen[id(part)] = part
        if issubclass(kind, (random.Random, np.random.RandomState, np.random.Generator)):
            found.append(part)
        elif kind is types.FunctionType:  # which refers to its module, too
            left += [part.__closure__, part.__defaults__, part.__kwdefaults__]
        else:
            left += gc.get_referents(part)[:_PARTS]
    return found


def seed_others(seed: int, generators: Sequence[Any]) -> None:
    """Seed ``generators``, each by another number, and those of PyTorch and OpenCV."""
    for number, generator in enumerate(generators, seed + 1):
        if isinstance(generator, np.random.Generator):
            bits = generator.bit_generator
            bits.state = type(bits)(number).state
        else:
            generator.seed(number)
    for module, seeding in _OF_MODULES:
        if module in sys.modules:
            getattr(sys.modules[module], seeding)(seed)


def seed_step(seed: int, step: int, rank: int, mxnet: bool = True) -> None:
    """Seed them for one rank's part of a step."""
    seed_all(sharding.step_seed(seed, step, rank), mxnet)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within it they may be seeded; afterwards the user's go on as if they had not been.

    MXNet's state cannot be read: its generator goes on from a number that it drew before.
    """
    own, numpys = random.getstate(), np.random.get_state()
    mxnets = int(mx.nd.random.randint(0, 2**31 - 1).asscalar())
    try:
        yield
    finally:
        random.setstate(own)
        np.random.set_state(numpys)
        mx.random.seed(mxnets)


@contextlib.contextmanager
def seeded_dropout() -> Iterator[None]:
    """Within it dropout on GPUs draws by MXNet's generators, not by cuDNN's, which no seed reaches.

    Graphs that are traced within it stay so. On CPUs there is no other way.
    """
    modules = mx.nd, mx.sym  # a hybrid_forward's F
    plain = [module.Dropout for module in modules]
    for module, dropout in zip(modules, plain):
        module.Dropout = functools.partial(_without_cudnn, dropout)
    try:
        yield
    finally:
        for module, dropout in zip(modules, plain):
            module.Dropout = dropout


def _without_cudnn(dropout: Callable[..., Any], *inputs: Any, **arguments: Any) -> Any:
    return dropout(*inputs, **{**arguments, "cudnn_off": True})

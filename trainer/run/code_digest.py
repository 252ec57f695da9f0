"""Digests of functions and objects: other behaviour gives another, in whatever process."""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import hashlib
import itertools
import types
from typing import Any, Callable, Dict, Iterable, List, Set, Tuple

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import mxnet_internals
from ..errors import LIBRARIES

_CONTAINERS = (tuple, list, set, frozenset, dict)


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def said_of(what: Any, known: Dict[int, Tuple[Any, str]]) -> str:
    """A text that tells functions and objects of other behaviour apart, whatever the process.

    ``known`` are those that have been met, each with its text, by id.
    """
    if isinstance(what, (int, float, complex, str, bytes, range, slice, np.generic, type(None))):
        return repr(what)
    if id(what) not in known:
        known[id(what)] = what, "itself"
        text = _content(what, functools.partial(said_of, known=known))
        known[id(what)] = what, digest(text.encode())
    return known[id(what)][1]


def _content(what: Any, said: Callable[[Any], str]) -> str:
    if isinstance(what, gluon.Parameter):
        what = what.list_data()[0] if mxnet_internals.is_initialised(what) else what.shape
    if isinstance(what, (mx.nd.NDArray, np.ndarray)):
        content = what if isinstance(what, np.ndarray) else what.asnumpy()
        return f"{content.dtype} {content.shape} {digest(content.tobytes())}"
    if isinstance(what, enum.Enum):
        return f"{what} {said(what.value)}"
    if isinstance(what, _CONTAINERS):
        texts = [said(each) for each in (what.items() if isinstance(what, dict) else what)]
        text = f"{texts if isinstance(what, (tuple, list)) else sorted(texts)}"
        return text + (_object_said(what, said) if _functions(type(what)) else "")
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
    steps = _steps(what)
    read = {s.argval for s in steps if s.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    around = {} if _is_library(what) else {n: what.__globals__.get(n) for n in sorted(read)}
    for name, cell in zip(what.__code__.co_freevars, what.__closure__ or ()):
        with contextlib.suppress(ValueError):  # it has no value yet
            around[name] = cell.cell_contents
    around = {name: _as_read(value, _attributes([what])) for name, value in around.items()}
    generated = _is_library(what) and what.__code__.co_filename == "<string>"
    text = [
        f"{s.opname} {said(s.arg if 'FAST' in s.opname else s.argval)}"  # local ones have any name
        for s in steps
        # MXNet's generated functions hold an address in memory; their names tell them apart.
        if not isinstance(s.argval, types.CodeType) and not generated
    ]
    return f"{what.__qualname__} {text} {said((what.__defaults__, what.__kwdefaults__, around))}"


def _object_said(what: Any, said: Callable[[Any], str]) -> str:
    """Of a class or an object: names, the functions that are no library's, and what it holds."""
    kind = what if isinstance(what, type) else type(what)
    own = _functions(kind)
    parts: Any = ()
    if kind is not what and (own or callable(what)):  # a lock or a logger computes nothing
        inside = mxnet_internals.children(what) if isinstance(what, gluon.Block) else []
        ignored = vars(gluon.HybridBlock()) if isinstance(what, gluon.Block) else {}
        read = _attributes(own.values())
        held = {n: v for n, v in _held(what, read).items() if n not in ignored}
        plain = {n: _as_read(v, read) for n, v in held.items() if not _functions(type(v))}
        parts = {**held, **plain}, inside
    name = getattr(what, "__name__", "")
    return f"{kind.__module__}.{kind.__qualname__} {name} {said(own)} {said(parts)}"


def _as_read(value: Any, names: Set[str]) -> Any:
    """``value``; of a class, and what cannot be called, only what code that reads attributes of
    these ``names`` makes use of, by methods too."""
    kind = value if isinstance(value, type) else type(value)
    functions, known = _functions(kind), -1
    named = kind is value or (getattr(value, "__dict__", functions) and not callable(value))
    if not named or isinstance(value, (gluon.Parameter, enum.Enum, *_CONTAINERS)):
        return value
    while len(names) != known:
        known = len(names)
        names = names | _attributes(functions[name] for name in functions.keys() & names)
    held = _held(value, names)
    return (kind, {name: held[name] for name in sorted(held.keys() & names)}) if held else value


def _held(what: Any, names: Set[str]) -> Dict[str, Any]:
    """The attributes of an object; those that its class has, or a class, of these ``names``."""
    kind = what if isinstance(what, type) else type(what)
    within = _within(kind)
    held = {n: v for n, v in within.items() if n in names and not hasattr(v, "__get__")}
    if kind is not what:
        slots = [name for base in kind.__mro__ for name in vars(base).get("__slots__", ())]
        held.update({n: getattr(what, n) for n in slots if n[:2] != "__" and hasattr(what, n)})
        held.update(getattr(what, "__dict__", {}))
    return held


def _within(kind: type) -> Dict[str, Any]:
    return {name: value for base in reversed(kind.__mro__) for name, value in vars(base).items()}


def _functions(kind: type) -> Dict[str, types.FunctionType]:
    """A class's own and inherited ones, by name, but a library's; also static ones, properties'."""
    bare = {n: getattr(f, "__func__", getattr(f, "fget", f)) for n, f in _within(kind).items()}
    own = {n: f for n, f in bare.items() if isinstance(f, types.FunctionType)}
    return {name: function for name, function in own.items() if not _is_library(function)}


def _attributes(functions: Iterable[types.FunctionType]) -> Set[str]:
    """The names of the attributes that these functions read."""
    steps = itertools.chain.from_iterable(map(_steps, functions))
    return {step.argval for step in steps if step.opname in ("LOAD_ATTR", "LOAD_METHOD")}


def _steps(function: types.FunctionType) -> List[dis.Instruction]:
    """The instructions of a function, and of those within it."""
    codes: List[Any] = [function.__code__]
    for code in codes:
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return [step for code in codes for step in dis.get_instructions(code)]


def _is_library(function: types.FunctionType) -> bool:
    """Whether the global variables that it reads are no part of what uses it."""
    return str(function.__globals__.get("__file__")).startswith(LIBRARIES)

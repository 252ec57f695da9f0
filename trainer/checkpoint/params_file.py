"""Validates a file of arrays before MXNet loads it, and starts a net from one.

``mx.nd.load`` trusts the sizes in a file: a corrupt one makes it allocate a petabyte or crash the
process. The format of MXNet's ``.params`` files (src/ndarray/ndarray.cc, little-endian): a header,
each array's shape, device, type and values, then a name for each.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import struct
from pathlib import Path
from typing import BinaryIO, Dict, Iterator, List, Mapping, Optional, Tuple, TypeVar

import mxnet as mx
from mxnet import gluon

from ..errors import ConfigError
from ..mxnet_internals import structural_parameters

_LIST_MAGIC = 0x112
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA  # of an array; MXNet 0.x begins with dimensions
_DENSE = 0
_ITEM_SIZES = {0: 4, 1: 8, 2: 2, 3: 1, 4: 4, 5: 1, 6: 8, 7: 1}  # bytes, by MXNet's number of a type
_MOST_DIMENSIONS = 32
_SHOWN = 4  # names in a message

T = TypeVar("T")


def problem(path: Path) -> Optional[str]:
    """What is wrong with the file of dense, named arrays at ``path``; None if it is valid."""
    try:
        with open(path, "rb") as file:
            return _walk(file, path.stat().st_size)
    except struct.error:
        return "it ends too early"
    except UnicodeDecodeError:
        return "its names are no texts"
    except OSError as error:
        return str(error.strerror)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[None]:
    """Raise OSError, after the block, unless the file which MXNet saved at ``path`` is complete;
    MXNet does not notice a disk that fills up at the last block.
    """
    try:
        yield
    except mx.MXNetError as error:
        reason = "MXNet could not write all of it; is the disk full?"
        raise OSError(errno.EIO, reason, str(path)) from error
    if problem(path) is not None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _walk(file: BinaryIO, size: int) -> Optional[str]:
    magic, _, count = _read(file, "<QQQ")
    if magic != _LIST_MAGIC or count == 0:
        return "it is no file of MXNet's arrays"
    for number in range(count):
        wrong = _skip_array(file, size)
        if wrong is not None:
            return f"array {number} {wrong}"
    if _read(file, "<Q") != (count,):
        return "it does not name each of its arrays"
    names = set()
    for _ in range(count):
        (length,) = _read(file, "<Q")
        if length > size - file.tell():
            return "it ends within a name"
        names.add(file.read(length).decode())
    if len(names) != count or "" in names:
        return "it does not name each of its arrays"
    return None if file.tell() == size else "it does not end where its arrays do"


def _skip_array(file: BinaryIO, size: int) -> Optional[str]:
    (magic,) = _read(file, "<I")
    if magic == _V3:
        return "was saved under npx.set_np(), whose arrays another MXNet reads; save it without"
    storage = _read(file, "<i")[0] if magic == _V2 else _DENSE
    dimensions = _read(file, "<i")[0] if magic in (_V1, _V2) else magic
    if storage != _DENSE or not 1 <= dimensions <= _MOST_DIMENSIONS:
        return "is not a dense array"
    shape = _read(file, f"<{dimensions}{'q' if magic in (_V1, _V2) else 'I'}")
    _, _, kind = _read(file, "<iii")
    if min(shape) < 1 or kind not in _ITEM_SIZES:
        return "has no shape and type that MXNet knows"
    end = file.tell() + _ITEM_SIZES[kind] * math.prod(shape)
    if end > size:
        return "is longer than the file"
    file.seek(end)
    return None


def _read(file: BinaryIO, layout: str) -> Tuple[int, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def start_from(path: Path, net: gluon.Block) -> List[str]:
    """Give ``net``, which is initialised, the weights in a file, such as a model zoo's or those of
    ``net.save_parameters``; returns what to tell of the rest.

    Names are those of ``save_parameters`` (by structure) or of ``export`` and ``collect_params``
    (by prefix). Parameters that the file lacks, or holds in another shape, stay as they are drawn.
    Raises ConfigError if the file cannot be read, or fits nothing.
    """
    wrong = problem(path)
    if wrong is not None:
        raise ConfigError(f"model.weights is {path}; {wrong}")
    # arg: and aux: stand before the names that export gives
    found = {name.split(":", 1)[-1]: array for name, array in mx.nd.load(str(path)).items()}
    own = structural_parameters(net)
    if not own.keys() & found.keys():  # by prefix: resnetv20_conv0_weight
        found = _without_prefix(found)
        own = _without_prefix({p.name: p for p in own.values()})
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


def _without_prefix(named: Mapping[str, T]) -> Dict[str, T]:
    """By what follows the words that all names begin with."""
    # No paths: characters are what is compared.
    common = os.path.commonprefix(list(named)) if len(named) > 1 else ""  # noqa: RUF071
    return {name[common.rfind("_") + 1 :]: value for name, value in named.items()}


def _listed(names: List[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

"""Validates a file of arrays before MXNet loads it.

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
from typing import BinaryIO, Iterator, Optional, Tuple

import mxnet as mx

_LIST_MAGIC, _ARRAY_MAGIC = 0x112, 0xF993FAC9
_DENSE = 0
_ITEM_SIZES = {0: 4, 1: 8, 2: 2, 3: 1, 4: 4, 5: 1, 6: 8, 7: 1}  # bytes, by MXNet's number of a type
_MOST_DIMENSIONS = 32


def problem(path: Path) -> Optional[str]:
    """What is wrong with the file of dense, named arrays at ``path``; None if it is valid.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            return _walk(file, path.stat().st_size)
        except struct.error:
            return "it ends too early"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[None]:
    """Check, after the block, that the file which MXNet saved at ``path`` is complete.

    Raises:
        OSError: it is not; MXNet does not notice a disk that fills up at the last block.
    """
    try:
        yield
    except mx.MXNetError as error:
        raise OSError(errno.EIO, "MXNet could not write all of it", str(path)) from error
    if problem(path) is not None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _walk(file: BinaryIO, size: int) -> Optional[str]:
    magic, _, count = _read(file, "<QQQ")
    if magic != _LIST_MAGIC:
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
        names.add(file.read(length))
    if len(names) != count or not all(_is_text(name) for name in names):
        return "its names are not as many texts as it has arrays"
    return None if file.tell() == size else "it does not end where its arrays do"


def _skip_array(file: BinaryIO, size: int) -> Optional[str]:
    magic, storage, dimensions = _read(file, "<Iii")
    if magic != _ARRAY_MAGIC or storage != _DENSE or not 1 <= dimensions <= _MOST_DIMENSIONS:
        return "is not a dense array"
    shape = _read(file, f"<{dimensions}q")
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


def _is_text(name: bytes) -> bool:
    try:
        return bool(name.decode("utf-8"))
    except UnicodeDecodeError:
        return False

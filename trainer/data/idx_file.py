"""Reads MNIST's IDX files (http://yann.lecun.com/exdb/mnist) of images or labels, gzipped or not.

The format: four bytes of magic (0, 0, 8 for uint8, number of dimensions), each dimension as a
big-endian uint32, then the values in row-major order.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ..errors import UserError

_DIMENSIONS = {"images": 3, "labels": 1}
_TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}


class DataError(UserError):
    """A dataset cannot be found, or one of its files is not as it should be; one line."""


class BadSampleError(DataError):
    """A single sample cannot be used; one line that names it."""


def read(path: Path, kind: str) -> np.ndarray:
    """The array in the file at ``path``: uint8, (N, H, W) for images or (N,) for labels.

    Args:
        kind: ``images`` or ``labels``.

    Raises:
        DataError: the file cannot be read, is truncated or empty, or holds something else.
    """
    return parsed(decompressed(path), kind, path)


def decompressed(path: Path) -> bytes:
    """The content of a file, gzipped or not.

    Raises:
        DataError: the file cannot be read, or is truncated.
    """
    try:
        content = path.read_bytes()
        # By content, because some download tools decompress a file without renaming it.
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is truncated or corrupt, expected a gzipped IDX file: {error}"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def parsed(content: bytes, kind: str, path: Path) -> np.ndarray:
    """The array in the decompressed ``content`` of the file at ``path``; see :func:`read`."""
    ndim = _DIMENSIONS[kind]
    magic, start = bytes((0, 0, 8, ndim)), 4 + 4 * ndim
    if content[:4] != magic:
        raise DataError(
            f"{path} begins with {content[:4].hex() or 'nothing'}{_describe_magic(content[:4])}, "
            f"expected {magic.hex()} ({kind}: uint8, {ndim}-D)"
        )
    if len(content) < start:
        raise DataError(f"{path} is truncated: {len(content)} bytes, expected {start} and more")
    shape = struct.unpack_from(f">{ndim}I", content, 4)
    if 0 in shape:
        raise DataError(f"{path} is empty: {' x '.join(map(str, shape))} {kind} by its header")
    if len(content) - start != math.prod(shape):
        size = " x ".join(map(str, shape))
        raise DataError(
            f"{path} is truncated or corrupt: {len(content) - start} bytes of {kind},"
            f" expected {size} as its header says"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _describe_magic(magic: bytes) -> str:
    """The element type and number of dimensions in a magic number, for a message."""
    known = len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in _TYPES
    return f" ({_TYPES[magic[2]]}, {magic[3]}-D)" if known else ""

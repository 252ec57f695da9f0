"""Reads MNIST's IDX files (http://yann.lecun.com/exdb/mnist) of images or labels, gzipped or not.

The format: four bytes of magic (0, 0, 8 for uint8, number of dimensions), each dimension as a
big-endian uint32, then the values in row-major order.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Tuple

import numpy as np

from ..errors import UserError

_DIMENSIONS = {"images": 3, "labels": 1}
_TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
_CHUNK = 1 << 20
# Bytes that are unpacked of a gzipped file: those of MNIST's kind are some 5 times as large then,
# and a bomb of zeros 1,000 times.
_MOST, _MOST_TIMES = 1 << 30, 100


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
    return parsed(decompressed(path, kind), kind)


def decompressed(path: Path, kind: str) -> bytes:
    """The content of a file, gzipped or not, see :func:`read`; of no more than its header says."""
    try:
        with open(path, "rb") as file:
            # By content, because some download tools decompress a file without renaming it.
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            stream = gzip.GzipFile(fileobj=file) if packed else file
            header = stream.read(4 + 4 * _DIMENSIONS[kind])
            shape = _shape(header, kind, path)
            count = math.prod(shape)
            size = " x ".join(map(str, shape))
            on_disk = os.fstat(file.fileno()).st_size
            if packed and count > max(_MOST, _MOST_TIMES * on_disk):
                raise DataError(
                    f"{path} says {size}, {count >> 20} MiB of {on_disk >> 10} KiB: at most "
                    f"{_MOST >> 20} MiB, or {_MOST_TIMES} times its size, are unpacked of a file; "
                    "if it is no bomb, gunzip it first"
                )
            parts, left = [header], count + 1  # and one: whether it ends there
            while left and (part := stream.read(min(left, _CHUNK))):
                parts.append(part)
                left -= len(part)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is truncated or corrupt, expected a gzipped IDX file: {error}"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if left != 1:
        found = count + 1 - left if left else f"more than {count}"
        raise DataError(
            f"{path} is truncated or corrupt: {found} bytes of {kind}, expected {size} as its "
            "header says"
        )
    return b"".join(parts)


def parsed(content: bytes, kind: str) -> np.ndarray:
    """The array in what :func:`decompressed` gave."""
    ndim = _DIMENSIONS[kind]
    shape = struct.unpack_from(f">{ndim}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def _shape(header: bytes, kind: str, path: Path) -> Tuple[int, ...]:
    ndim = _DIMENSIONS[kind]
    magic = bytes((0, 0, 8, ndim))
    if header[:4] != magic:
        raise DataError(
            f"{path} begins with {header[:4].hex() or 'nothing'}{_describe_magic(header[:4])}, "
            f"expected {magic.hex()} ({kind}: uint8, {ndim}-D)"
        )
    if len(header) < 4 + 4 * ndim:
        raise DataError(
            f"{path} is truncated: {len(header)} bytes, expected {4 + 4 * ndim} and more"
        )
    shape = struct.unpack_from(f">{ndim}I", header, 4)
    if 0 in shape:
        raise DataError(f"{path} is empty: {' x '.join(map(str, shape))} {kind} by its header")
    return shape


def _describe_magic(magic: bytes) -> str:
    """The element type and number of dimensions in a magic number, for a message."""
    known = len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in _TYPES
    return f" ({_TYPES[magic[2]]}, {magic[3]}-D)" if known else ""

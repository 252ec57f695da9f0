"""Reads MNIST's IDX files (http://yann.lecun.com/exdb/mnist) of images or labels, gzipped or not.

The format: four bytes of magic (0, 0, 8 for uint8, number of dimensions), each dimension as a
big-endian uint32, then the values in row-major order.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Type

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


@contextlib.contextmanager
def readable(what: object, error_type: Type[DataError] = DataError) -> Iterator[None]:
    """Turn an OSError within it into one line: ``what`` cannot be read."""
    try:
        yield
    except OSError as error:
        # gzip's own errors have no strerror.
        raise error_type(f"{what} cannot be read: {error.strerror or error}") from None


def folder_at(place: str) -> Path:
    """The folder that a setting names; DataError where it must not be listed, which globs hide."""
    folder = Path(place).expanduser()
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise DataError(f"folder {folder} cannot be read: {os.strerror(errno.EACCES)}")
    return folder


def listed(names: Sequence[object], most: int) -> str:
    """The first ``most`` of ``names``, and how many more, printable: files' need not be UTF-8."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    text = ", ".join(map(str, names[:most])) + more
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def read(path: Path, name: str, sums: Optional[Dict[str, str]] = None) -> np.ndarray:
    """The array in the file at ``path``: uint8, (N, H, W) for images or (N,) for labels.

    Raises DataError where the file cannot be read, is truncated or empty, or holds something else.

    Args:
        name: ``images`` or ``labels``, or the name of a set's file of these.
        sums: SHA-256 of the decompressed content of such files by name: those of one must match.
    """
    kind = "images" if "images" in name else "labels"
    content, shape = _decompressed(path, kind)
    found = hashlib.sha256(content).hexdigest() if sums else ""
    if sums and sums.get(name, found) != found:
        hints = [f": it is the content of {other}" for other, sum_ in sums.items() if sum_ == found]
        raise DataError(
            f"{path} has content of SHA-256 {found}, expected {sums[name]}{''.join(hints)}"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _decompressed(path: Path, kind: str) -> Tuple[bytes, Tuple[int, ...]]:
    """The content of a file, gzipped or not, of no more than its header says; and its shape."""
    try:
        with readable(path), open(path, "rb") as file:
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
    except (EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is truncated or corrupt, expected a gzipped IDX file: {error}"
        ) from None
    if left != 1:
        found = count + 1 - left if left else f"more than {count}"
        raise DataError(
            f"{path} is truncated or corrupt: {found} bytes of {kind}, expected {size} as its "
            "header says"
        )
    return b"".join(parts), shape


def _shape(header: bytes, kind: str, path: Path) -> Tuple[int, ...]:
    ndim = _DIMENSIONS[kind]
    magic = bytes((0, 0, 8, ndim))
    if header[:4] != magic:
        held = f" ({_TYPES[header[2]]}, {header[3]}-D)" if is_magic(header[:4]) else ""
        raise DataError(
            f"{path} begins with {header[:4].hex() or 'nothing'}{held}, expected {magic.hex()} "
            f"({kind}: uint8, {ndim}-D)"
        )
    if len(header) < 4 + 4 * ndim:
        raise DataError(
            f"{path} is truncated: {len(header)} bytes, expected {4 + 4 * ndim} and more"
        )
    shape = struct.unpack_from(f">{ndim}I", header, 4)
    if 0 in shape:
        raise DataError(f"{path} is empty: {' x '.join(map(str, shape))} {kind} by its header")
    return shape


def is_magic(start: bytes) -> bool:
    """Whether a file that begins so is an IDX file: they have all kinds of names."""
    return len(start) == 4 and start[:2] == b"\0\0" and start[2] in _TYPES


def held(place: Path) -> List[str]:
    """The names of the IDX files in a folder, sorted, each without its ``.gz``."""
    names = (path.name for path in place.glob("[!.]*-ubyte*") if os.path.isfile(path))
    bare = {name[:-3] if name.endswith(".gz") else name for name in names}
    return sorted(name for name in bare if name.endswith("-ubyte"))


def locate(place: Path, name: str) -> Optional[Path]:
    """The path of the file ``name``, gzipped or not, or None where neither is.

    Before the name may stand that of a set, and ``test`` for ``t10k``, as in EMNIST; and a dot for
    the last hyphen but one, as on Kaggle. Raises DataError where the files of several sets are
    there, and none has the plain name.
    """
    forms = (name, name.replace("t10k", "test"))
    found = [other for other in held(place) if other.replace(".idx", "-idx").endswith(forms)]
    if len(found) > 1 and name not in found:
        raise DataError(
            f"folder {place} holds {' and '.join(found)}; leave the files of one set there"
        )
    if not found:
        return None
    stem = place / (name if name in found else found[0])
    packed = stem.with_name(f"{stem.name}.gz")
    return packed if packed.is_file() else stem

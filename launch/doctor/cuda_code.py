"""Which GPU architectures a compiled library holds code for, read from the library itself.

nvcc embeds "fat binaries": a header (magic 0xBA55ED50), then one entry for each architecture, of
machine code (sm_XY) or of PTX (compute_XY). A GPU runs machine code of its own major version and of
the same or a lower minor one; PTX is compiled when it is loaded, by any later GPU. The layout is
not documented by NVIDIA; what is read here agrees with what cuobjdump lists for MXNet's wheels.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import FrozenSet, Iterable, Iterator, Tuple

_MAGIC = struct.pack("<I", 0xBA55ED50)
_FAT_HEADER = struct.Struct("<IHHQ")  # magic, version, header size, bytes of all entries
_ENTRY_HEADER = struct.Struct("<HHIQIIHHI")  # kind, ?, header size, payload size, ..., architecture
_PTX, _ELF = 1, 2


@dataclass(frozen=True)
class GpuCode:
    """Architectures as XY of sm_XY (machine code) and compute_XY (PTX)."""

    machine: FrozenSet[int] = frozenset()
    ptx: FrozenSet[int] = frozenset()

    def runs_on(self, architecture: int) -> bool:
        """Whether a GPU of this architecture (90 for sm_90) can run the code."""
        same_major = (code for code in self.machine if code // 10 == architecture // 10)
        return any(code <= architecture for code in [*same_major, *self.ptx])

    def __str__(self) -> str:
        names = [f"sm_{a}" for a in sorted(self.machine)]
        return ", ".join(names + [f"compute_{a} (PTX)" for a in sorted(self.ptx)]) or "none"


def gpu_code(library: Path) -> GpuCode:
    """What `library` holds; nothing for a library without CUDA code."""
    with open(library, "rb") as file:
        if not file.seek(0, 2):
            return GpuCode()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _collect(_entries(content))


def _collect(entries: Iterable[Tuple[int, int]]) -> GpuCode:
    found = set(entries)
    return GpuCode(
        frozenset(architecture for kind, architecture in found if kind == _ELF),
        frozenset(architecture for kind, architecture in found if kind == _PTX),
    )


def _entries(content: mmap.mmap) -> Iterator[Tuple[int, int]]:
    """(kind, architecture) of each entry of each fat binary."""
    start = content.find(_MAGIC)
    while start >= 0:
        next_start = start + len(_MAGIC)
        if start + _FAT_HEADER.size <= len(content):
            _, version, header_size, size = _FAT_HEADER.unpack_from(content, start)
            # The magic number also turns up by chance, in code that checks for it.
            if version == 1 and header_size == _FAT_HEADER.size:
                first = start + header_size
                next_start = min(first + size, len(content))
                yield from _entries_between(content, first, next_start)
        start = content.find(_MAGIC, next_start)


def _entries_between(content: mmap.mmap, at: int, end: int) -> Iterator[Tuple[int, int]]:
    while at + _ENTRY_HEADER.size <= end:
        kind, _, header_size, size, *_, architecture = _ENTRY_HEADER.unpack_from(content, at)
        if kind not in (_PTX, _ELF) or header_size < _ENTRY_HEADER.size:
            return
        yield kind, architecture
        at += header_size + size

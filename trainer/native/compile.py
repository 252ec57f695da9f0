"""Compiles the C++ in native/ and finds the result again.

    python -m trainer.native.compile        compile it into this Python's environment

is part of ``make setup``; elsewhere the first module that needs a library compiles it, once per
user.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, Optional, Tuple

import mxnet as mx
import platformdirs

from launch.core import private

_SOURCES = Path(__file__).parent
# No -march: nodes with different CPUs may share a library.
_FLAGS = ("-std=c++14", "-O3", "-shared", "-fPIC", "-fvisibility=hidden")
# Each library's main source, which includes the others, and its further flags.
_LIBRARIES: Dict[str, Tuple[str, ...]] = {
    "batch_norm": ("-fopenmp-simd", "-pthread"),
    "momentum": ("-fopenmp", "-ffp-contract=off"),
    "halves": (),
}
_ENVIRONMENT = Path(sys.prefix, "lib")


@functools.lru_cache(maxsize=None)
def load(library: str, without: str, speaks: bool) -> Optional[ctypes.CDLL]:
    """A library of native/, by name; compiled if it has not been.

    Where that is impossible (no compiler, no place to write that is the user's alone), None, and a
    process that ``speaks`` says ``without``: what happens without it.
    """
    try:
        found = _find(library) or compile_into(private.folder(_cache()), library)
        return ctypes.CDLL(str(found))
    except (OSError, subprocess.CalledProcessError) as error:
        if speaks:
            why = str(getattr(error, "stderr", None) or error).strip().splitlines()[0]
            print(f"{without}, which is slower: no C++ ({why})", file=sys.stderr)
        return None


def _cache() -> Path:
    return Path(platformdirs.user_cache_dir("gluon-horovod-trainer"))


def _file_name(library: str) -> str:
    """A name that changes with the sources, the flags, MXNet's version and the machine."""
    recipe = [*_FLAGS, *_LIBRARIES[library], mx.__version__, platform.machine()]
    sources = (path.read_bytes() for path in sorted(_SOURCES.glob("*.[ch]*")))
    digest = hashlib.sha256(b"".join(sources) + " ".join(recipe).encode())
    return f"{library}-{digest.hexdigest()[:16]}.so"


def _find(library: str) -> Optional[Path]:
    """A library that was compiled; raises PermissionError where others can have put one there."""
    path = _ENVIRONMENT / _file_name(library)  # as trusted as this Python is
    if path.exists():
        return path
    path = _cache() / path.name
    if not path.exists():
        return None
    return private.check(path)


def compile_into(folder: Path, library: str) -> Path:
    """Compile a library, atomically, even where several processes do so at once.

    Raises:
        OSError: there is no compiler, or ``folder`` cannot be written.
        CalledProcessError: the compiler failed.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "c++"]
    path = folder / _file_name(library)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fresh = Path(scratch) / path.name
        source = _SOURCES / f"{library}.cc"
        command = [*compiler, *_FLAGS, *_LIBRARIES[library], str(source), "-o", str(fresh)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        fresh.replace(path)
    return path


if __name__ == "__main__":
    for name in _LIBRARIES:
        compile_into(_ENVIRONMENT, name)

"""One-line descriptions of errors raised in the user's own code, such as a net or its factory."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import mxnet as mx

# Frames in these places say nothing about the user's mistake.
_LIBRARIES = (
    str(Path(__file__).parent),
    *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")),
    "<",  # frozen modules
)


def describe_error(error: Exception) -> str:
    """``KeyError: 'x' (mynets.py, line 12)``, by the innermost frame outside of libraries."""
    text = str(error).strip()
    if isinstance(error, mx.MXNetError):
        text = text.splitlines()[-1] if text else text  # the lines above are MXNet's own stack
    else:
        text = f"{type(error).__name__}: {' '.join(text.split())}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else text

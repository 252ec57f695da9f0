"""What goes wrong in the user's own code, a factory or a net, told in a line with its place."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import mxnet as mx

# Whose lines say nothing of the user's mistake.
_LIBRARIES = (
    str(Path(__file__).parent),
    *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")),
    "<",  # frozen modules
)


def told(error: Exception) -> str:
    """``KeyError: 'x' (mynets.py, line 12)``: the innermost line that is no library's."""
    text = str(error).strip()
    if isinstance(error, mx.MXNetError):
        text = text.splitlines()[-1] if text else text  # above it, the stack of MXNet itself
    else:
        text = f"{type(error).__name__}: {' '.join(text.split())}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else text

"""Errors that users can fix, shown in one line, and words for them."""

from __future__ import annotations

import difflib
import sysconfig
import traceback
from pathlib import Path
from typing import Any, List, Sequence


class UserError(ValueError):
    """An error that the user can fix, shown in one line, without a traceback."""

    alone = False  # it came between collectives: no other rank knows of it

    def _render_traceback_(self) -> List[str]:
        """Shown by IPython instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(UserError):
    """An invalid setting: what was given, what is allowed, the fix."""


def nearest(name: str, known: Sequence[str]) -> str:
    """``; did you mean ...?`` with the most similar of ``known``; empty if none is similar."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    leaf = name.rsplit(".", 1)[-1]
    matches = matches or [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    return f"; did you mean {matches[0]}?" if matches else ""


def show(value: Any) -> str:
    """``value`` for a message, truncated to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Code in these places says nothing about the user's.
LIBRARIES = (
    str(Path(__file__).parent),
    *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")),
    "<",  # frozen modules
)


def first_line(error: Exception) -> str:
    """Of an error's text; its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def describe_error(error: Exception) -> str:
    """``KeyError: 'x' (mynets.py, line 12)``, by the innermost frame outside of libraries."""
    from mxnet import MXNetError  # late: errors are for programs without MXNet too

    text = str(error).strip()
    if isinstance(error, MXNetError):
        text = text.splitlines()[-1] if text else text  # the lines above are MXNet's own stack
    else:
        text = f"{type(error).__name__}: {' '.join(text.split())}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)]
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else text

"""Pickles of functions and objects for another process, with MXNet's special cases.

cloudpickle sends by value what it cannot name. Two things of MXNet's hold addresses of this
process: an operator (`mx.nd.tanh`), which names a module that does not exist and would end the
other process with a segmentation fault; and the compiled graph of a hybridized net.
"""

from __future__ import annotations

import io
import sys
from types import FunctionType
from typing import Any

import cloudpickle

_OPERATORS = {"ndarray": "mxnet.ndarray", "symbol": "mxnet.symbol"}  # as they say -> as it is


def dumps(value: Any) -> bytes:
    """`value` for `pickle.loads`; raises whatever a `__reduce__` raises."""
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """Operators by their names; compiled graphs as None, for which nets compile anew."""
        kind = type(obj)
        if kind.__name__ == "CachedOp" and kind.__module__.startswith("mxnet."):
            return type(None), ()
        if isinstance(obj, FunctionType):
            module = sys.modules.get(_OPERATORS.get(obj.__module__, ""))
            if module is not None and getattr(module, obj.__name__, None) is obj:
                return getattr, (module, obj.__name__)
        return super().reducer_override(obj)

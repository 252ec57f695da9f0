"""Pickles of functions and objects for another process, with MXNet's special cases.

cloudpickle sends by value what it cannot name. Three things of MXNet's hold addresses of this
process: an operator (`mx.nd.tanh`), which names a module that does not exist and would end the
other process with a segmentation fault; the compiled graph of a hybridized net; and a parameter,
whose array autograd knows by its address, so that a copy of it would get no gradient.
"""

from __future__ import annotations

import io
import sys
from types import FunctionType
from typing import Any, Dict

import cloudpickle

_OPERATORS = {"ndarray": "mxnet.ndarray", "symbol": "mxnet.symbol"}  # as they say -> as it is


def dumps(value: Any) -> bytes:
    """`value` for `pickle.loads`; raises whatever a `__reduce__` raises."""
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """Operators by their names; compiled graphs as None, for which nets compile anew.

        Parameters go without their gradients and without the trainer that they refer to.
        """
        kind = type(obj)
        if _is_parameter(kind):
            state = {**vars(obj), "_grad": None, "_trainer": None}
            return kind.__new__, (kind,), state, None, None, _restore_parameter
        if kind.__name__ == "CachedOp" and kind.__module__.startswith("mxnet."):
            return type(None), ()
        if isinstance(obj, FunctionType):
            module = sys.modules.get(_OPERATORS.get(obj.__module__, ""))
            if module is not None and getattr(module, obj.__name__, None) is obj:
                return getattr, (module, obj.__name__)
        return super().reducer_override(obj)


def _is_parameter(kind: type) -> bool:
    mxnet = sys.modules.get("mxnet")
    return mxnet is not None and issubclass(kind, mxnet.gluon.Parameter)


def _restore_parameter(parameter: Any, state: Dict[str, Any]) -> None:
    vars(parameter).update(state)
    if parameter._data is not None:
        parameter._init_grad()

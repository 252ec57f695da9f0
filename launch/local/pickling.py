"""Pickles of functions and objects for another process, with MXNet's special cases.

cloudpickle sends by value what it cannot name. Three things of MXNet's hold addresses of this
process: an operator (`mx.nd.tanh`), which names a module that does not exist and would end the
other process with a segmentation fault; the compiled graph of a hybridized net, which may also name
operators that exist here alone; and a parameter, whose array autograd knows by its address, so that
a copy of it would get no gradient. Arrays arrive on the CPU: on a GPU they would give every rank a
context on that one. `trainer.fit` moves a net to where it computes.
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
        """Operators by their names; nets without compiled graphs, so that they compile anew.

        Parameters go without their gradients, their trainer and their symbol.
        """
        kind = type(obj)
        mxnet = sys.modules.get("mxnet")
        if mxnet is not None and issubclass(kind, mxnet.gluon.Parameter):
            state = _on_cpu(vars(obj), mxnet.cpu())
            return kind.__new__, (kind,), state, None, None, _restore_parameter
        if mxnet is not None and issubclass(kind, mxnet.nd.NDArray) and obj.context != mxnet.cpu():
            return obj.as_in_context(mxnet.cpu()).__reduce__()
        if mxnet is not None and issubclass(kind, mxnet.gluon.HybridBlock):
            return _without_graph(obj, imported=issubclass(kind, mxnet.gluon.SymbolBlock))
        if isinstance(obj, FunctionType):
            module = sys.modules.get(_OPERATORS.get(obj.__module__, ""))
            if module is not None and getattr(module, obj.__name__, None) is obj:
                return getattr, (module, obj.__name__)
        return super().reducer_override(obj)


def _without_graph(block: Any, imported: bool) -> Any:
    """How `block` is pickled, except for what it has compiled; an imported graph is its content."""
    reduced = block.__reduce_ex__(4)
    if len(reduced) < 3 or not isinstance(reduced[2], dict):  # its class has its own way
        return reduced
    empty: Dict[str, Any] = {"_cached_op": None, "_cached_op_args": [], "_cached_graph": ()}
    if imported:
        del empty["_cached_graph"]
    make, arguments, state, *rest = reduced
    return (make, arguments, {**state, **empty}, *rest)


def _on_cpu(state: Dict[str, Any], cpu: Any) -> Dict[str, Any]:
    """The state of a parameter that is alone, and on the CPU."""
    state = {**state, "_grad": None, "_trainer": None, "_var": None}
    if state["_data"]:
        state.update(_data=state["_data"][:1], _ctx_list=[cpu], _ctx_map=[[], [0]])
    if state["_deferred_init"]:
        initializer, _, *rest = state["_deferred_init"]
        state["_deferred_init"] = (initializer, [cpu], *rest)
    return state


def _restore_parameter(parameter: Any, state: Dict[str, Any]) -> None:
    vars(parameter).update(state)
    if parameter._data is not None:
        parameter._init_grad()

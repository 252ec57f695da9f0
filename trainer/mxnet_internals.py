"""What MXNet 1.9.1 keeps under private names, and the trainer needs: each behind a function.

No other file of the trainer reaches for such a name: with another MXNet this one has to be read
again. Most are in a step's path: they look up an attribute, copy and wait for nothing, or say so.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import weakref
from functools import partial
from operator import attrgetter, methodcaller
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import mxnet as mx
from mxnet import gluon

# The shared library, through ctypes: what its C interface can do and Python's lacks.
C_LIBRARY = mx.base._LIB

# Base of nn.BatchNorm and nn.BatchNormReLU, which have no other in common.
BatchNormBase = gluon.nn.basic_layers._BatchNorm


# Of a trainer, with Horovod's or without.


# The trainer's own list, by whose indices its optimizer knows parameters; frozen ones too.
all_parameters: Callable[[gluon.Trainer], List[gluon.Parameter]] = attrgetter("_params")

# What the update multiplies gradients by, before it divides them by the batch size.
scale: Callable[[gluon.Trainer], float] = attrgetter("_scale")

# The devices that hold the parameters.
devices: Callable[[gluon.Trainer], List[mx.Context]] = attrgetter("_contexts")

# Whether any gradient is sparse.
has_sparse_gradients: Callable[[gluon.Trainer], bool] = attrgetter("_contains_sparse_grad")

# What ``trainer.allreduce_grads()`` calls once it has checked the key-value store.
allreduce_of: Callable[[gluon.Trainer], Callable[[], None]] = attrgetter("_allreduce_grads")


def trained_parameters(trainer: gluon.Trainer) -> List[gluon.Parameter]:
    """Those that have a gradient, in the order of :func:`all_parameters`."""
    return [p for p in trainer._params if p.grad_req != "null"]


def divide_by(trainer: gluon.Trainer, ranks: int) -> None:
    """Have the update divide gradients, which are then sums over ranks, by their number."""
    trainer._scale /= ranks


def set_allreduce(trainer: gluon.Trainer, allreduce: Callable[[], None]) -> None:
    """Have ``trainer.allreduce_grads()`` and ``trainer.step()`` call ``allreduce``."""
    trainer._allreduce_grads = allreduce


def updater(trainer: gluon.Trainer) -> mx.optimizer.Updater:
    """The updater of the first device, which holds the optimizer's arrays by parameters' index."""
    return trainer._updaters[0]


def optimizer_arrays(trainer: gluon.Trainer, index: int) -> List[mx.nd.NDArray]:
    """The optimizer's arrays of a parameter; made if there was no update yet."""
    held = updater(trainer)
    if index not in held.states:
        weight = trainer._params[index].list_data()[0]
        held.states[index] = trainer.optimizer.create_state_multi_precision(index, weight)
        held.states_synced[index] = True

    def flat(state: Any) -> List[mx.nd.NDArray]:  # None, an array, or nested tuples of these
        if isinstance(state, (list, tuple)):
            return [array for item in state for array in flat(item)]
        return [] if state is None else [state]

    return flat(held.states[index])


def move_states(source: gluon.Trainer, target: gluon.Trainer, places: Dict[int, int]) -> None:
    """Have ``target`` go on with the optimizer's arrays and counts of ``source``.

    ``places`` has each parameter's index in ``source``, and that in ``target``.
    """
    old, new = source._updaters[0], target._updaters[0]
    new.states = {places[k]: state for k, state in old.states.items()}
    new.states_synced = {places[k]: synced for k, synced in old.states_synced.items()}
    counts = {places[k]: n for k, n in update_counts(source).items()}
    update_counts(target).clear()
    update_counts(target).update(counts)


def update_counts(trainer: gluon.Trainer) -> Dict[int, int]:
    """How often each parameter was updated, by index; the optimizer's own dict for the device."""
    return trainer.optimizer._all_index_update_counts.setdefault(devices(trainer)[0].device_id, {})


# Of parameters and their arrays.

# Whether backward has written the gradient of a parameter's array since its last update.
has_fresh_gradient: Callable[[mx.nd.NDArray], bool] = attrgetter("_fresh_grad")


def is_statistic(parameter: gluon.Parameter) -> bool:
    """Whether Gluon marks it as not differentiable, as a running mean or variance."""
    return not parameter._differentiable


def is_initialised(parameter: gluon.Parameter) -> bool:
    """Whether it has a value, not only the promise of one once its shape is known."""
    return parameter._data is not None


def mark_as_statistic(parameter: gluon.Parameter) -> None:
    """Have :func:`is_statistic` find it: Gluon lets only the constructor say so."""
    parameter._differentiable = False


def gradient_or_none(parameter: gluon.Parameter) -> Optional[mx.nd.NDArray]:
    """Its first device's gradient; None where ``parameter.grad()`` would raise."""
    return parameter._grad[0] if parameter._grad is not None else None


def set_gradient(parameter: gluon.Parameter, gradient: mx.nd.NDArray) -> None:
    """Redirect the gradient to another array, which already holds its value; on one device."""
    data = parameter.list_data()
    fresh = data[0]._fresh_grad
    parameter._grad = [gradient]
    mx.autograd.mark_variables(data, parameter._grad, parameter.grad_req)
    data[0]._fresh_grad = fresh


def mark_gradient_as_fresh(data: mx.nd.NDArray) -> None:
    """Have the trainer update a parameter's array, although backward has not been there."""
    data._fresh_grad = True


def wait_to_write(array: mx.nd.NDArray) -> None:
    """Wait until the engine neither writes nor reads it."""
    mx.base.check_call(C_LIBRARY.MXNDArrayWaitToWrite(array.handle))


def push(
    function: Any, task: int, release: Any, source: mx.nd.NDArray, target: mx.nd.NDArray
) -> None:
    """Have the engine call a C function when both arrays are ready, as an operator of them.

    That is ``void function(void* context, void* task)``, which reads ``source`` and writes
    ``target``; ``void release(void* task)`` is called once afterwards.
    """
    device = (ctypes.c_int32 * 2)(target.context.device_typeid, target.context.device_id)
    called, released = (ctypes.cast(each, ctypes.c_void_p) for each in (function, release))
    where = ctypes.byref(device), ctypes.byref(source.handle), 1, ctypes.byref(target.handle), 1
    what = called, ctypes.c_void_p(task), released
    mx.base.check_call(C_LIBRARY.MXEnginePushSyncND(*what, *where, None, 0, b"half"))


# Of blocks.

Named = Callable[[gluon.Block], Dict[str, gluon.Parameter]]

# Parameters by the path of attributes that leads to them: the names in a parameter file. Those of
# ``collect_params`` depend on how many layers the process has made before. A parameter that several
# blocks share is there under each one's path.
structural_parameters: Named = methodcaller("_collect_params_with_prefix")

# The parameters that are attributes of the block itself, by the attribute's name.
own_parameters: Named = attrgetter("_reg_params")

# The arguments of MXNet's operator in one of Gluon's batch norm layers; its own dict.
kernel_arguments: Callable[[gluon.Block], Dict[str, Any]] = attrgetter("_kwargs")


def ordered_parameters(block: gluon.Block) -> List[gluon.Parameter]:
    """Each parameter once, in an order that all processes share: sorted by structural name.

    The order of ``collect_params``, and of a trainer that is given it, follows names that count the
    layers which the process has made before. What is no attribute of its block comes last.
    """
    named = structural_parameters(block)
    found = {id(named[name]): named[name] for name in sorted(named)}
    for parameter in block.collect_params().values():
        found.setdefault(id(parameter), parameter)
    return list(found.values())


def children(block: gluon.Block) -> List[gluon.Block]:
    """The blocks that are its attributes, or were added to it, in that order."""
    return list(block._children.values())


def blocks_by_path(block: gluon.Block, path: str = "") -> Dict[str, gluon.Block]:
    """It and all blocks within it by the path of attributes; a shared one is there under each."""
    found = {path: block}
    for name, child in block._children.items():
        found.update(blocks_by_path(child, f"{path}.{name}"))
    return found


def blocks(block: gluon.Block) -> List[gluon.Block]:
    """It and all blocks within it, each once, sorted by path: in one order on every rank."""
    found = blocks_by_path(block)
    return list({id(found[path]): found[path] for path in sorted(found)}.values())


def every_parameter(block: gluon.Block) -> List[gluon.Parameter]:
    """Each once. Unlike ``collect_params`` this does not fail where two have the same name."""
    return list({id(p): p for each in blocks(block) for p in each.params.values()}.values())


def traced_symbol(block: gluon.HybridBlock) -> Optional[mx.sym.Symbol]:
    """The graph that a hybridized block has traced, or a SymbolBlock has read; None without."""
    graph = getattr(block, "_cached_graph", None)  # no attribute while it is made
    return graph[1] if graph else None


def runs_its_graph_alone(block: gluon.Block) -> bool:
    """Whether a call of it runs :func:`traced_symbol` and nothing else of it, nor hooks."""
    own, base = type(block), gluon.HybridBlock
    plain = issubclass(own, base) and own.forward == base.forward and own.__call__ == base.__call__
    hooks = block._forward_hooks or block._forward_pre_hooks
    return bool(plain and not hooks and block._active and block._cached_graph)


def has_static_graph(block: gluon.HybridBlock) -> bool:
    """Whether it has compiled a graph whose arrays are bound to it (``static_shape=True``)."""
    return traced_symbol(block) is not None and bool(dict(block._flags).get("static_shape"))


# The blocks whose layers have been traced. Not looked for where it matters: in another thread
# ``tuple(...)`` raises SystemError if it has not ended while ``gc.get_objects`` has its tuple.
_traced = weakref.WeakSet(
    # Not isinstance, which reads obj.__class__: on some proxies that raises.
    block
    for block in gc.get_objects()
    if issubclass(type(block), gluon.HybridBlock)
)
_trace = gluon.HybridBlock._get_graph


def _noted(block: gluon.HybridBlock, *args: Any) -> Any:
    _traced.add(block)
    return _trace(block, *args)


gluon.HybridBlock._get_graph = _noted


def clear_graphs(parameters: Iterable[gluon.Parameter], static: bool = False) -> None:
    """Drop the cached graphs, or the static ones, of all live blocks that use these parameters.

    A parameter does not know the blocks that use it, nor a block what it is a part of.
    """
    used = set(map(id, parameters))
    for block in list(_traced):
        found = has_static_graph(block) if static else traced_symbol(block) is not None
        if found and used & set(map(id, every_parameter(block))):
            block._clear_cached_op()  # its next forward traces its layers again


# Static ones would keep writing to the arrays of gradients that have been moved.
clear_static_graphs = partial(clear_graphs, static=True)


@contextlib.contextmanager
def _kept(names: Tuple[str, ...], objects: List[Any]) -> Iterator[None]:
    before = [[getattr(each, name) for name in names] for each in objects]
    try:
        yield
    finally:
        for each, values in zip(objects, before):
            for name, value in zip(names, values):
                setattr(each, name, value)


# Have these hybridized afterwards as before; what they compile within it stays.
compilation_kept = partial(_kept, ("_active", "_flags", "_backend", "_backend_opts"))

# How these parameters are trained is afterwards as before. A trainer refuses later changes of the
# gradient, and holds the optimizer's arrays.
training_kept = partial(_kept, ("grad_req", "lr_mult", "wd_mult", "_trainer"))


# Of a dataset.


def stored_parts(dataset: Any) -> Optional[List[Any]]:
    """What one of Gluon's datasets holds and gives as it is; None if it reads or transforms."""
    if type(dataset) is gluon.data.ArrayDataset:
        return list(dataset._data)
    if type(dataset) is gluon.data.SimpleDataset:
        return [dataset._data]
    if isinstance(dataset, gluon.data.dataset._DownloadedDataset) and dataset._transform is None:
        return [dataset._data, dataset._label]  # MNIST, CIFAR10, ...
    return None

"""Exports a trained net to files independent of this project, each verified against the original.

- ``model-symbol.json`` and ``model-0000.params``: MXNet's own, for ``gluon.SymbolBlock.imports``;
- ``model.onnx``: for ONNX Runtime and other readers of ONNX, with any batch size.

Both take float32 (N, C, H, W), resized and normalised as in training, and give logits (N, K).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple, Union

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import batch_norm
from ..checkpoint import CheckpointError, params_file
from ..data import input_pipeline
from ..data.arrays import Arrays
from ..data.loader import EvalLoader
from ..data.sources.base import ArraySource, Source
from ..errors import UserError, first_line
from ..mxnet_internals import traced_symbol
from ..step.evaluation import Evaluation
from .trained_model import Saved, check_finite, test_set

SYMBOL, PARAMETERS, ONNX = "model-symbol.json", "model-0000.params", "model.onnx"
INPUT = "data"

# MXNet's converter emits operators of opset 13, but labels them with the newest opset that the onnx
# package knows. IR version 7 belongs to opset 13.
OPERATOR_SET, IR_VERSION = 13, 7

TOLERANCE = 1e-3  # of a logit, absolute and relative: float32 sums in another order
_ACCURACY_TOLERANCE = 0.01  # between devices and kernels
NOISE_IMAGES = 64  # compared instead of a test set, where there is none

Forward = Callable[[np.ndarray], np.ndarray]  # float32 (N, C, H, W) -> (N, K)


class ExportError(UserError):
    """The net cannot be exported, or an exported file computes something else; one line."""


class Checked(NamedTuple):
    """A file's model compared to the original, over the whole test set or over noise."""

    name: str
    samples: int
    difference: float  # largest absolute difference of a logit
    called: str = "test"  # the set
    accuracy: Optional[float] = None  # 0 to 1; None on noise
    original_accuracy: Optional[float] = None

    def __str__(self) -> str:
        if self.accuracy is None:
            return (
                f"{self.name}: largest difference of a score {self.difference:.1e}, on "
                f"{self.samples} images of noise, as no test set was found"
            )
        return (
            f"{self.name}: accuracy {self.accuracy:.4f} on {self.samples} {self.called} images, "
            f"the checkpoint's {self.original_accuracy:.4f}; largest difference of a score "
            f"{self.difference:.1e}"
        )


def check_accuracy(saved: Saved, seen: Evaluation, called: str = "test") -> None:
    """Refuse, by CheckpointError, a model that is not as accurate as was recorded with it.

    ``called`` is the set on which it was ``seen``: the recorded one may be the validation set.
    """
    if saved.accuracy is None or saved.chosen_on != called:
        return
    if abs(seen.accuracy - saved.accuracy) > _ACCURACY_TOLERANCE:
        raise CheckpointError(
            f"{saved.path} has an accuracy of {seen.accuracy:.4f} on this {called} set, and "
            f"{saved.accuracy:.4f} was recorded: give the net and the data it was trained with"
        )


def check_possible(saved: Saved, onnx: bool) -> None:
    """Refuse, by ExportError, an imperative net, and ONNX where packages are missing."""
    missing = [p for p in ("onnx", "onnxruntime") if onnx and importlib.util.find_spec(p) is None]
    if missing:
        raise ExportError(
            f"ONNX needs {' and '.join(missing)}: pip install -r requirements-export.txt; "
            "or leave it out with --no-onnx"
        )
    if not isinstance(saved.net, gluon.HybridBlock):
        raise ExportError(
            f"{saved.config.model.factory} is a {type(saved.net).__name__}, an imperative Block, "
            "whose forward only Python can run; export takes a HybridBlock (HybridSequential, "
            "hybrid_forward), as trainer/model/ has them. Its weights load into one of the same "
            "structure"
        )


def export(
    saved: Saved, test: Union[Arrays, Source, None], folder: Path, onnx: bool = True
) -> List[Checked]:
    """Write the files into ``folder`` and verify each on the whole of ``test``, on the CPU.

    None for ``test`` compares on noise, which gives no accuracy. An earlier ``model.onnx`` does not
    stay beside files without one. Raises ExportError where the net or one of its operators cannot
    be exported, or a file computes something else.
    """
    check_possible(saved, onnx)
    with contextlib.ExitStack() as until_done:
        if test is not None and not isinstance(test, Source):
            test = test_set(saved, test)
            until_done.callback(test.close)
        if saved.ctx != mx.cpu():  # where the files are run: GPUs may compute in TF32
            saved.net.collect_params().reset_ctx(mx.cpu())
            until_done.callback(lambda: saved.net.collect_params().reset_ctx(saved.ctx))
        checked = _exported(saved._replace(ctx=mx.cpu()), test, folder, onnx)
    if not onnx:
        (folder / ONNX).unlink(missing_ok=True)
    return checked


def _exported(saved: Saved, test: Optional[Source], folder: Path, onnx: bool) -> List[Checked]:
    folder.mkdir(parents=True, exist_ok=True)
    shown = test
    if shown is None:
        pixels = np.random.RandomState(0).randint(0, 256, (NOISE_IMAGES, *saved.image_shape))
        shown = ArraySource(pixels.astype(np.uint8), np.zeros(NOISE_IMAGES, int))
    loader = input_pipeline.test_loader(shown, saved.config, saved.ctx)
    original, labels = _scores(loader, _gluon(saved.net, saved.ctx))
    check_finite(saved, original)

    def check(name: str, forward: Forward) -> Checked:
        found, _ = _scores(loader, forward)
        both = () if test is None else (found, original)
        right = [float((scores.argmax(axis=1) == labels).mean()) for scores in both]
        difference = float(np.abs(found - original).max())
        checked = Checked(name, len(found), difference, shown.called, *right)
        if not np.allclose(found, original, rtol=TOLERANCE, atol=TOLERANCE):
            raise ExportError(
                f"{checked}: it does not compute what the checkpoint does; do not use it"
            )
        return checked

    first = loader.first()
    assert first is not None
    _write_symbol(saved.net, first.data, folder)
    checked = [check(SYMBOL, _load_symbol(folder))]
    if onnx:
        _write_onnx(saved, first.data.shape[1:], folder)
        checked.append(check(ONNX, _load_onnx(folder)))
    return checked


def _scores(loader: EvalLoader, forward: Forward) -> Tuple[np.ndarray, np.ndarray]:
    """Logits of the whole set, float32 (N, K), and its labels, (N,)."""
    found = [(forward(batch.data.asnumpy()), batch.label.asnumpy()) for batch in loader]
    scores, labels = map(np.concatenate, zip(*found))
    return scores, labels


def _gluon(net: gluon.Block, ctx: mx.Context) -> Forward:
    return lambda data: net(mx.nd.array(data, ctx=ctx)).asnumpy()


def _write_symbol(net: gluon.HybridBlock, batch: mx.nd.NDArray, folder: Path) -> None:
    batch_norm.revert_sync_batch_norm(net)  # a symbol file cannot contain a Python operator
    try:
        net.hybridize()
        net(batch)
        mx.nd.waitall()
    # A user's HybridBlock may fail in any way on symbols.
    except Exception as error:
        reason = first_line(error)
        raise ExportError(
            f"{type(net).__name__} cannot be made a symbol: {reason}; every part of its "
            "hybrid_forward must be an operator of F"
        ) from error
    if traced_symbol(net) is None:
        raise ExportError(
            f"{type(net).__name__} has a forward of its own, which only Python can run; write it "
            "as a hybrid_forward, whose every part is an operator of F"
        )
    with params_file.whole(folder / PARAMETERS):
        net.export(str(folder / "model"), epoch=0)


def _load_symbol(folder: Path) -> Forward:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Cannot decide type")  # float32, its default, is right
        net = gluon.SymbolBlock.imports(
            str(folder / SYMBOL), [INPUT], str(folder / PARAMETERS), ctx=mx.cpu()
        )
    return _gluon(net, mx.cpu())


def _write_onnx(saved: Saved, shape: Any, folder: Path) -> None:
    import mxnet.onnx
    import onnx

    path = str(folder / ONNX)
    try:
        with _converting():
            mxnet.onnx.export_model(
                str(folder / SYMBOL),
                str(folder / PARAMETERS),
                [(1, *shape)],
                [np.float32],
                path,
                dynamic=True,
                dynamic_input_shapes=[(None, *shape)],
            )
    # AttributeError names the operator that has no ONNX translation; translations raise any other.
    except Exception as error:
        raise ExportError(
            f"MXNet cannot write this net as ONNX: {first_line(error)}; use --no-onnx"
        ) from error
    model = onnx.load(path)
    model.opset_import[0].version, model.ir_version = OPERATOR_SET, IR_VERSION
    # Weights listed as inputs can be replaced by the caller, which prevents constant folding.
    inputs = [value for value in model.graph.input if value.name == INPUT]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    # The converter leaves helpers behind that no operator takes; ONNX Runtime would name each.
    taken = {name for node in model.graph.node for name in node.input}
    initializers = [value for value in model.graph.initializer if value.name in taken]
    del model.graph.initializer[:]
    model.graph.initializer.extend(initializers)
    data, pixels = saved.config.data, f"{saved.pixels}, (pixel / 255 - mean) / std"
    texts = {"mean": data.mean_text, "std": data.std_text, "input": pixels}
    texts["classes"] = json.dumps(saved.class_names)
    onnx.helper.set_model_props(model, texts)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _load_onnx(folder: Path) -> Forward:
    import onnxruntime

    path = str(folder / ONNX)
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class
        reason = first_line(error)
        raise ExportError(f"ONNX Runtime cannot run this net: {reason}; use --no-onnx") from error
    return lambda data: np.asarray(session.run(None, {INPUT: data})[0])


@contextlib.contextmanager
def _converting() -> Iterator[None]:
    """Have the converter log no line for each operator, and its graphs checked by their own
    operator set: the newest refuses some of 13.
    """
    import onnx

    context, disabled = onnx.checker.DEFAULT_CONTEXT, logging.root.manager.disable
    newest = context.opset_imports
    logging.disable(logging.INFO)
    context.opset_imports = {"": OPERATOR_SET}
    try:
        yield
    finally:
        logging.disable(disabled)
        context.opset_imports = newest

"""One training or evaluation step: no I/O, no logging, no waiting for the device."""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import mxnet as mx
from mxnet import autograd, gluon
from mxnet.gluon import rnn

from .. import batch_norm, dist
from ..batch_norm import running_statistics
from ..config import Config
from ..data.augment.mixing import Mixed
from ..data.loader import Batch
from ..errors import ConfigError
from ..model.loss_scale import LossScale
from ..mxnet_internals import blocks, trained_parameters
from .gradients import reduce_and_update
from .loss import Loss, cross_entropy
from .timing import Mark, unmarked

CUDNN = "gpu"  # where it computes plain batch norm, of MXNet's kinds of devices


class StepResult(NamedTuple):
    """Sums over this rank's samples of a global batch, on the device."""

    loss_sum: mx.nd.NDArray  # float32 (1,)
    correct: mx.nd.NDArray  # float32 (1,)
    gradient_norm: Optional[mx.nd.NDArray]  # float32 (1,), of the global batch


def forward(net: gluon.Block, data: mx.nd.NDArray) -> mx.nd.NDArray:
    """Logits, float32 (B, K) whatever the net's own dtype, of ``data``, float32 (B, C, H, W).

    Raises ConfigError if the net returns something else, as some do in training mode only.
    """
    logits = net(data)
    if not isinstance(logits, mx.nd.NDArray):
        mode = "training" if autograd.is_training() else "inference"
        raise ConfigError(
            f"in {mode} the net gives a {type(logits).__name__}; it must be one array of scores, "
            "(batch, classes): have its forward return the first, or their sum"
        )
    return logits.astype("float32", copy=False)


def train_step(
    net: gluon.Block,
    trainer: gluon.Trainer,
    batch: Batch,
    config: Config,
    want_norm: bool = False,
    mark: Mark = unmarked,
    loss_of: Optional[Loss] = None,
    scale: Optional[LossScale] = None,
) -> StepResult:
    """One training step: forward, backward, average over ranks, update; collective.

    The gradient is that of the mean loss over the global batch, however its samples are sharded:
    each rank weights its samples by world_size / global_samples, and the trainer divides the sum
    over ranks by world_size.

    Args:
        want_norm: return the gradient norm, and leave gradients for ``gradients.mean_gradients``.
        mark: called with each of ``timing.PARTS`` when that part of the step has been enqueued.
        loss_of: None takes cross entropy with the label smoothing of ``config``.
        scale: of the loss, in float16; a step whose gradients overflow then changes no weight.
    """
    loss_of = loss_of or functools.partial(cross_entropy, smoothing=config.train.label_smoothing)
    if config.optimizer.accumulate > 1:
        for parameter in trained_parameters(trainer):
            parameter.zero_grad()
    sums, stop = [], 0
    for rows in batch.micro_batches or (batch.samples,):
        start, stop = stop, stop + rows
        part = slice(start, stop)
        sums.append(_forward_backward(net, batch, part, loss_of, mark, scale))
    loss_sum, correct = (functools.reduce(operator.add, parts) for parts in zip(*sums))
    norm = reduce_and_update(trainer, config.optimizer.clip_norm, want_norm, mark, scale)
    return StepResult(loss_sum, correct, norm)


def _forward_backward(
    net: gluon.Block,
    batch: Batch,
    part: slice,
    loss_of: Loss,
    mark: Mark,
    scale: Optional[LossScale],
) -> Tuple[mx.nd.NDArray, mx.nd.NDArray]:
    """Backward over a part of a rank's batch; sums of loss and correct ones.

    Without samples the rank runs a placeholder of weight 0, to take part in every collective: with
    batch norm over ranks as an empty batch, otherwise in inference mode, which does not update
    running statistics.
    """
    rows = part.stop - part.start
    empty = rows == 0
    awaited = empty and batch_norm.is_over_ranks(net)
    arrays = [batch.data, batch.label, *(batch.mixed or ())]
    if rows != batch.samples:
        arrays = [array[slice(0, 1) if empty else part] for array in arrays]
    # Of one sample cuDNN's running variance is NaN. Of the same sample twice it is that of CPUs.
    twice = rows == 1 and batch.data.context.device_type == CUDNN and not batch_norm.is_synced(net)
    if twice:
        arrays = [array.repeat(2, axis=0) for array in arrays]
    data, label, mixed = arrays[0], arrays[1], Mixed(*arrays[2:]) if batch.mixed else None
    if running_statistics.move_with_input_gradient(net) or _recurs(weakref.ref(net)):
        data.attach_grad()
    share = 0.0 if empty else 0.5 if twice else 1.0  # of each row
    weight = share * dist.world_size() / batch.global_samples
    context = batch_norm.empty_batch() if awaited else contextlib.nullcontext()
    with context:
        with autograd.record(train_mode=awaited or not empty):
            logits = forward(net, data)
            mark("forward")
            loss = _of_mixed(lambda label: loss_of(logits, label), label, mixed)
        gradient = _filled(loss.shape, weight, loss.context, loss.dtype)
        loss.backward(gradient if scale is None else scale.applied(gradient))
    mark("backward")
    best = logits.detach().argmax(axis=-1)
    correct = _of_mixed(lambda label: mx.nd.equal(best, label), label, mixed)
    sums = loss.detach().sum(), correct.sum()
    return sums if share == 1 else (sums[0] * share, sums[1] * share)


@functools.lru_cache(maxsize=8)  # nets of one program
def _recurs(net: weakref.ref[gluon.Block]) -> bool:
    """Without a gradient of its input MXNet's own RNN (float64, or no oneDNN) leaves out those of
    all layers but the last: their weights' gradients are what lay there before.
    """
    return any(isinstance(block, (rnn.RNN, rnn.LSTM, rnn.GRU)) for block in blocks(net()))


@functools.lru_cache(maxsize=8)  # steps are alike, but for the last of an epoch
def _filled(shape: Tuple[int, ...], value: float, ctx: mx.Context, dtype: type) -> mx.nd.NDArray:
    return mx.nd.full(shape, value, ctx=ctx, dtype=dtype)


def _of_mixed(
    of: Callable[[mx.nd.NDArray], mx.nd.NDArray], label: mx.nd.NDArray, mixed: Optional[Mixed]
) -> mx.nd.NDArray:
    """What ``of`` gives for the labels; of mixed samples the mean over both, by their shares.

    For cross entropy, which is linear in the labels, this is its value for the soft label.
    """
    if mixed is None:
        return of(label)
    return mixed.share * of(label) + (1 - mixed.share) * of(mixed.label)


def eval_step(
    net: gluon.Block, batch: Batch, functions: Sequence[Loss], flip: bool = False
) -> Tuple[List[mx.nd.NDArray], mx.nd.NDArray]:
    """What each function, a loss or metric, gives, float32 (B,); and logits, float32 (B, K).

    With ``flip`` logits are the mean of those of each image and of its mirror image.
    """
    logits = forward(net, batch.data)
    if flip:
        logits = (logits + forward(net, batch.data.flip(axis=3))) / 2
    return [of(logits, batch.label) for of in functions], logits

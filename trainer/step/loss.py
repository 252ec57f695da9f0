"""Losses: softmax cross entropy, and the check of a loss or metric that the user gives."""

from __future__ import annotations

from typing import Callable

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from .. import console, dist
from ..errors import ConfigError, describe_error


def check_loss(loss_of: Loss, scores: int, ctx: mx.Context) -> None:
    """Refuse a loss that does not give one value per sample, or has no gradient.

    Raises:
        ConfigError: it fails, has another shape, cannot be differentiated, or has parameters to be
            trained.
    """
    own = loss_of.collect_params().values() if isinstance(loss_of, gluon.Block) else ()
    trained = [parameter.name for parameter in own if parameter.grad_req != "null"]
    if trained:
        raise ConfigError(
            f"the loss has parameters of its own ({', '.join(trained)}), which fit would not "
            "train; make them part of the net, and the loss a function of its scores"
        )
    found = check_values("the loss", loss_of, scores, ctx)
    try:
        found.backward()
        mx.nd.waitall()
    except Exception as error:
        raise ConfigError(
            f"the loss has no gradient with respect to the scores: {describe_error(error)}; "
            "compute it by operators of MXNet, on the arrays it is given"
        ) from error


@np.errstate(all="ignore")
def check_values(what: str, of: Loss, scores: int, ctx: mx.Context) -> mx.nd.NDArray:
    """What a loss or metric gives for 2 samples, recorded.

    Warns where what it gives for one depends on the other.

    Raises:
        ConfigError: it fails, or gives something else than one value per sample.
    """
    if isinstance(of, type):
        name = of.__name__
        raise ConfigError(f"{what} is the class {name}; give an instance of it, {name}()")
    given = mx.nd.array(np.random.RandomState(0).normal(size=(2, scores)), ctx=ctx)
    label = mx.nd.zeros((2,), ctx=ctx)
    given.attach_grad()
    try:
        with autograd.record():
            found = of(given, label)
        again, alone = of(given, label), of(given[:1], label[:1])
        mx.nd.waitall()
    except Exception as error:
        raise ConfigError(
            f"{what} cannot take scores (2, {scores}) and labels (2,): {describe_error(error)}"
        ) from error
    shapes = [getattr(each, "shape", ()) or type(each).__name__ for each in (found, alone)]
    if shapes != [(2,), (1,)]:
        raise ConfigError(
            f"{what} gives {shapes[0]} for 2 samples and {shapes[1]} for one; it must be (2,) and "
            "(1,), one number for each, as Gluon's losses give"
        )
    in_pair, repeated, by_itself = (each.asnumpy()[0] for each in (found, again, alone))
    far = abs(in_pair - by_itself) > 1e-3 * abs(in_pair) + 1e-6
    if far and in_pair == repeated and dist.is_root():
        console.warn(
            f"what {what} gives for a sample depends on the other samples in its batch, and so on "
            "the number of ranks and optimizer.accumulate; use the sample's own scores alone"
        )
    return found


def are_probabilities(scores: np.ndarray) -> bool:
    """Whether each row of ``scores``, (B, K), looks like the result of a softmax."""
    sums = scores.astype(np.float64).sum(axis=1)
    return scores.shape[1] > 1 and bool((scores >= 0).all() and (abs(sums - 1) < 1e-3).all())


def warn_of_second_softmax(loss_of: Loss, scores: mx.nd.NDArray) -> None:
    """Warn if the net's ``scores``, (1, K), are probabilities and the loss takes their softmax.

    A loss does if it stays the same where the same is added to all scores.
    """
    if not are_probabilities(scores.asnumpy()):
        return
    label = mx.nd.zeros((len(scores),), ctx=scores.context)
    losses = [loss_of(scores + constant, label).asnumpy() for constant in (0, 1)]
    if np.allclose(losses[0], losses[1], rtol=1e-4):
        console.warn(
            "the net's scores are probabilities (none negative, their sum 1), and the loss takes "
            "their softmax once more, which slows training and costs accuracy: leave the net's "
            "softmax out"
        )


# Maps logits (B, K) and labels (B,) to the loss of each sample (B,).
Loss = Callable[[mx.nd.NDArray, mx.nd.NDArray], mx.nd.NDArray]


def cross_entropy(
    logits: mx.nd.NDArray, label: mx.nd.NDArray, smoothing: float = 0.0
) -> mx.nd.NDArray:
    """Softmax cross entropy of each sample, (B, K) and (B,) -> (B,).

    With ``smoothing`` s the target is 1 - s on the label plus s / K on every class (Szegedy et
    al., "Rethinking the Inception architecture", CVPR 2016, section 7).
    """
    log_probability = mx.nd.log_softmax(logits, axis=-1)
    loss = -mx.nd.pick(log_probability, label, axis=-1)
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * log_probability.mean(axis=-1)
    return loss

"""A run with train.ema evaluates, saves and returns the averages, and resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn

import launch
from tests.transformed import Transform
from trainer import checkpoint
from trainer.config import Data

DECAY, STEPS = 0.8, 7
DRAW = np.random.RandomState(0)
SET = DRAW.randint(0, 256, (41, 6, 6)).astype(np.uint8), np.arange(41) % 4

Values = Dict[str, np.ndarray]


def make_net() -> gluon.Block:
    mx.random.seed(3)
    net = nn.HybridSequential()
    net.add(nn.Conv2D(3, 3, in_channels=1), nn.BatchNorm(in_channels=3))
    net.add(nn.Activation("tanh"), nn.Dense(4, in_units=48))
    net.initialize(mx.init.Uniform(0.5))
    return net


def values_of(net: gluon.Block) -> Values:
    mx.nd.waitall()
    named = net._collect_params_with_prefix().items()
    return {name: parameter.data().asnumpy() for name, parameter in named}


def run(net: Any, folder: str, norm: str, max_steps: Any = None, **train: Any) -> Any:
    """(weights by step, those of the net in the end, evaluations) of this rank."""
    from trainer.config import from_dict
    from trainer.run.loop import fit

    steps, seen = {}, []
    settings = {
        "output": folder,
        "batch_norm": norm,
        "train": {"epochs": 1, "global_batch_size": 6, "max_steps": max_steps, **train},
        "optimizer": {"lr": 0.5},
        "monitor": {"loggers": []},
        "checkpoint": {"keep": 9},
    }
    fit(
        net,
        from_dict(settings),
        train=SET,
        test=SET,
        on_step=lambda end: steps.update({end.step: values_of(net)}),
        on_evaluation=lambda end: seen.append((end.step, end.evaluation.loss)),
    )
    return steps, values_of(net), seen


def averages(initial: Values, steps: Dict[int, Values]) -> Values:
    found = {name: value.astype(np.float64) for name, value in initial.items()}
    for step in sorted(steps):
        d = min(DECAY, (1 + step) / (10 + step))
        found = {name: d * found[name] + (1 - d) * steps[step][name] for name in found}
    return found


def run_all(net: Any, folder: str, norm: str) -> Any:
    """With averages, without, and stopped and gone on with: the last part of three."""
    told = run(net, f"{folder}/whole", norm, ema=DECAY)
    plain = run(make_net(), f"{folder}/plain", norm)
    for step in (1, 4, None):
        resumed = run(make_net(), f"{folder}/parts", norm, step, ema=DECAY)
    return told, plain, resumed


@pytest.mark.parametrize("ranks, norm", [(1, "local"), (2, "sync"), (3, "sync"), (2, "local")])
def test_averages_are_evaluated_saved_and_returned_and_resumed(
    tmp_path: Path, ranks: int, norm: str
) -> None:
    net = make_net()
    told, plain, resumed = zip(*launch.run(run_all, (net, str(tmp_path), norm), ranks=ranks))
    for (steps, final, seen), (others, _, _) in zip(told, plain):
        assert len(steps) == STEPS
        for name in final:  # training is as without it
            assert all((steps[s][name] == others[s][name]).all() for s in steps), name
            assert (final[name] == told[0][1][name]).all(), name
        assert seen == told[0][2]
    steps, final, seen = told[0]
    expected = averages(values_of(net), steps)
    compared = [n for n in final if norm == "sync" or ranks == 1 or "running" not in n]
    for name in compared:
        np.testing.assert_allclose(final[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for name, parameter in net._collect_params_with_prefix().items():
        parameter.set_data(mx.nd.array(final[name]))
    pixels = Transform(SET[0], Data(), 0, training=False)(np.arange(41))
    scores = net(mx.nd.array(pixels)).asnumpy().astype(np.float64)
    losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(41), SET[1]]
    assert seen == [(STEPS, pytest.approx(losses.mean(), rel=1e-4))]
    path = checkpoint.listing(tmp_path / "whole" / "default" / "checkpoints")[-1]
    saved = {k: v.asnumpy() for k, v in mx.nd.load(str(path / "model.params")).items()}
    assert all((saved[name] == told[0][1][name]).all() for name in saved)

    for (steps, final, seen), (all_steps, all_final, all_seen) in zip(resumed, told):
        assert sorted(steps) == [5, 6, 7] and seen == all_seen
        for name in final:
            assert final[name].tobytes() == all_final[name].tobytes()
            assert all(steps[s][name].tobytes() == all_steps[s][name].tobytes() for s in steps)

"""Nets that differ from the seed's in what Gluon allows, through a whole run on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from trainer.config import ConfigError, from_dict
from trainer.loop import Result, fit

DRAW = np.random.RandomState(0)
SET = DRAW.randint(0, 256, (12, 6, 6)).astype(np.uint8), np.arange(12) % 4


def trained(net: gluon.Block, folder: Path, **settings: Any) -> Result:
    config = {"output": str(folder), "train": {"epochs": 1, "global_batch_size": 4}, **settings}
    return fit(net, from_dict(config), train=SET, test=SET)


class OwnForward(gluon.HybridBlock):
    """Gluon does not compile it, though it is a HybridBlock: it knows arrays alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Dense(4)

    def forward(self, x: mx.nd.NDArray) -> mx.nd.NDArray:
        return self.head(x.as_in_context(x.context))


class Double(gluon.HybridBlock):
    """It computes, and answers, in another precision."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm(), nn.Dense(4)
        self.cast("float64")

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return self.head(self.norm(F.cast(x, "float64")))


class TwoHeads(gluon.Block):
    """One answer in inference, two in training, as GoogLeNet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.other = nn.Dense(4), nn.Dense(4, in_units=36)

    def forward(self, x: mx.nd.NDArray) -> Any:
        return (self.head(x), self.other(x)) if autograd.is_training() else self.head(x)


def test_a_net_that_cannot_be_drawn_is_trained(tmp_path: Path, capsys: Any) -> None:
    assert trained(OwnForward(), tmp_path).steps == 3
    assert "no graph of the net in TensorBoard: AttributeError" in "".join(capsys.readouterr())


def test_a_net_may_compute_in_float64(tmp_path: Path) -> None:
    net = Double()
    result = trained(net, tmp_path, batch_norm="sync")
    assert result.evaluation is not None and np.isfinite(result.evaluation.loss)
    assert net.head.weight.data().dtype == np.float64


def test_two_answers_in_training_are_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in training the net gives a tuple") as raised:
        trained(TwoHeads(), tmp_path)
    assert "\n" not in str(raised.value)

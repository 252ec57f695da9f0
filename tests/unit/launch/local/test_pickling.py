"""What is sent to another process computes the same there."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn

from launch.local import pickling

ROOT = Path(__file__).parents[4]
OTHER_PROCESS = """
import pickle, sys
import mxnet as mx
from trainer.model import prepare
from trainer.config import Config

compiled, unready, operators = pickle.load(sys.stdin.buffer)
assert operators == (mx.nd.tanh, mx.sym.tanh)
prepare.prepare_net(unready, Config(), (1, 2, 3), mx.cpu())
outputs = [net(mx.nd.ones((2, 1, 2, 3))) for net in (compiled, unready)]
sys.stdout.buffer.write(pickle.dumps([output.asnumpy() for output in outputs]))
"""


class Shifted(gluon.HybridBlock):
    """It adds a constant, which Gluon initialises by a name that this process alone knows."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = self.params.get_constant("shift", mx.nd.arange(3))
        self.head = nn.Dense(3, weight_initializer="zeros")

    def hybrid_forward(self, F: Any, x: Any, shift: Any) -> Any:
        return F.broadcast_add(self.head(x), F.reshape(shift, (1, 3)))


def test_nets_compute_the_same_in_another_process() -> None:
    compiled = nn.HybridSequential()
    compiled.add(nn.Dense(3), nn.HybridLambda("tanh"), nn.HybridLambda(lambda F, x: F.relu(x)))
    compiled.initialize()
    compiled.hybridize(static_alloc=True)
    expected = compiled(mx.nd.ones((2, 1, 2, 3))).asnumpy()
    task = pickling.dumps((compiled, Shifted(), (mx.nd.tanh, mx.sym.tanh)))
    assert b'"nodes"' not in task, "a graph may have operators that the other process lacks"
    command = [sys.executable, "-c", OTHER_PROCESS]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}  # which has Shifted
    done = subprocess.run(
        command, input=task, cwd=ROOT, env=environment, stdout=subprocess.PIPE, timeout=120
    )
    assert done.returncode == 0
    found, shifted = pickle.loads(done.stdout)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(shifted, [[0, 1, 2]] * 2)


def test_an_unpickled_net_can_be_trained() -> None:
    net = nn.HybridSequential()
    net.add(nn.Dense(3, in_units=6), nn.Dense(2, in_units=3), nn.Dense(2, in_units=2))
    net.initialize()
    net[1].collect_params().setattr("grad_req", "add")
    net[2].collect_params().setattr("grad_req", "null")
    gluon.Trainer(net.collect_params(), "sgd")  # parameters refer to it
    for each in (net, pickle.loads(pickling.dumps(net))):
        trainer = gluon.Trainer(each.collect_params(), "sgd", {"learning_rate": 1.0})
        with autograd.record():
            loss = each(mx.nd.ones((4, 6))).sum()
        loss.backward()
        trainer.step(4)
    for own, other in zip(net.collect_params().values(), each.collect_params().values()):
        assert (own.grad_req, own.wd_mult) == (other.grad_req, other.wd_mult)
        np.testing.assert_array_equal(own.data().asnumpy(), other.data().asnumpy())
        if own.grad_req != "null":
            assert own.grad().asnumpy().any()
            np.testing.assert_array_equal(own.grad().asnumpy(), other.grad().asnumpy())


def test_nets_and_arrays_arrive_on_the_cpu() -> None:
    """Else every rank would have a context on the notebook's GPU, for which cpu(1) stands."""
    there = mx.cpu(1)
    net, unready = nn.Dense(3, in_units=2), nn.Dense(3)
    for each in (net, unready):
        each.initialize(mx.init.One(), ctx=[there, mx.cpu(2)])
    array = mx.nd.ones((1, 2), ctx=there)
    *nets, copied = pickle.loads(pickling.dumps((net, unready, array)))
    assert copied.context == mx.cpu()
    for each in nets:
        with autograd.record():
            loss = each(copied).sum()
        loss.backward()
        assert each.weight.list_ctx() == [mx.cpu()]
        assert each.weight.grad().context == mx.cpu()
        assert loss.asscalar() == 6
    assert net.weight.list_ctx() == [there, mx.cpu(2)]

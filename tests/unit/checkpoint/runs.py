"""A small run, and what it saves."""

from __future__ import annotations

from pathlib import Path

import mxnet as mx
import numpy as np
from mxnet.gluon import nn

from trainer import checkpoint
from trainer.checkpoint import RunState, listing
from trainer.config import Config, Optimizer
from trainer.data.loader import Batch
from trainer.step.optimizer import make_trainer
from trainer.step.step import train_step

FILES = ["manifest.json", "model.params", "optimizer.params", "state.json"]
TOTALS = [[1.5, 2.0, 6.0], [-3.0, 4.0, 12.0]]  # a loss may be below zero


class Run:
    """A net with batch norm and dropout, its trainer, and steps that depend on their number."""

    def __init__(self, name="sgd", units=3, seed=0, names=(None, None), ctx=None, **optimizer):
        mx.random.seed(seed)
        self.net = nn.HybridSequential()
        self.net.add(
            nn.Dense(4, in_units=5, prefix=names[0]),
            nn.BatchNorm(in_channels=4),
            nn.Activation("tanh"),
            nn.Dropout(0.3),
            nn.Dense(units, in_units=4, prefix=names[1]),
        )
        self.ctx = ctx or mx.cpu()
        self.net.initialize(mx.init.Normal(0.5), self.ctx)
        settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **optimizer}
        self.config = Config(optimizer=Optimizer(name, **settings))
        self.trainer = make_trainer(self.net, self.config.optimizer)

    def train(self, first: int, last: int) -> Run:
        for step in range(first, last):
            random = np.random.RandomState(step)
            data = mx.nd.array(random.normal(size=(6, 5)), self.ctx)
            label = mx.nd.array(random.randint(0, 3, 6), self.ctx)
            parts = self.config.optimizer.accumulate
            batch = Batch(data, label, 6, 6, (6 // parts,) * parts)
            mx.random.seed(step)
            self.trainer.set_learning_rate(0.05 / (1 + step))
            train_step(self.net, self.trainer, batch, self.config)
        return self

    def save(self, folder: Path, step: int, accuracy=None, keep: int = 2, **state) -> Path:
        state = {"totals": TOTALS, "accuracy": accuracy, "config": {"seed": 1}, **state}
        state["step"] = step
        content = checkpoint.snapshot(self.net, self.trainer, RunState(**state))
        path = checkpoint.write(folder, content)
        checkpoint.prune(folder, keep)
        return path

    def arrays(self) -> dict:
        """Every bit that the run consists of: parameters, running statistics, momenta."""
        mx.nd.waitall()
        parameters = self.net._collect_params_with_prefix()
        found = {name: p.data().asnumpy() for name, p in parameters.items()}
        # Not by the trainer's numbers: those depend on the layers that were made before.
        names = {id(p): name for name, p in parameters.items()}

        def flat(prefix, state):
            if isinstance(state, (list, tuple)):
                for place, item in enumerate(state):
                    flat(f"{prefix}.{place}", item)
            elif state is not None:
                found[prefix] = state.asnumpy()

        for index, state in self.trainer._updaters[0].states.items():
            flat(f"state of {names[id(self.trainer._params[index])]}", state)
        return found


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def names(folder: Path) -> list:
    return [path.name[-2:] for path in listing(folder)]

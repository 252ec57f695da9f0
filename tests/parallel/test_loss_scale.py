"""float16's loss scale on several ranks: an overflow on one skips the step on all, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Tuple

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn

from tests import half
from trainer import batch_norm, checkpoint, dist
from trainer.config import Config, from_dict
from trainer.data.loader import Batch
from trainer.model import loss_scale
from trainer.model.loss_scale import LossScale
from trainer.mxnet_internals import all_parameters, optimizer_arrays
from trainer.run.loop import fit
from trainer.step.optimizer import make_trainer
from trainer.step.step import train_step

RANKS = (2, 3)
STEPS, OVERFLOWS = 8, (0, 3, 4)
OPTIMIZERS: List[Dict[str, Any]] = [
    {},
    {"nesterov": True, "shared_memory": False},
    {"momentum": 0.0, "clip_norm": 0.05},
    {"accumulate": 2, "clip_norm": 0.05, "shared_memory": False},
    {"name": "adam"},
]


def _net(norm: str) -> gluon.Block:
    mx.random.seed(0)
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3, in_channels=1, use_bias=False), nn.BatchNorm(in_channels=4))
    net.add(nn.Activation("tanh"), nn.Dense(4, in_units=4 * 6 * 6))
    if norm == "sync":
        batch_norm.convert_sync_batch_norm(net)
    net.initialize(mx.init.Normal(0.3))
    net.hybridize(static_alloc=True)
    batch_norm.connect(net)
    return net


def _batch(step: int, optimizer: Dict[str, Any]) -> Batch:
    draw = np.random.RandomState(100 * step + dist.rank())
    data = mx.nd.array(draw.normal(size=(4, 1, 8, 8)))
    parts = (2, 2) if "accumulate" in optimizer else ()
    return Batch(data, mx.nd.array(draw.randint(0, 4, 4)), 4, 4 * dist.world_size(), parts)


def _bits(net: gluon.Block, trainer: gluon.Trainer) -> List[str]:
    """Of weights and of the optimizer's arrays; not of running statistics."""
    mx.nd.waitall()
    trained = [(n, p) for n, p in enumerate(all_parameters(trainer)) if p.grad_req != "null"]
    arrays = [array for n, p in trained for array in (p.data(), *optimizer_arrays(trainer, n))]
    return [array.asnumpy().tobytes().hex() for array in arrays]


@pytest.mark.parametrize(
    "norm, optimizer",
    [*(("local", one) for one in OPTIMIZERS), ("sync", OPTIMIZERS[1]), ("sync", OPTIMIZERS[3])],
)
def test_an_infinity_on_one_rank_skips_the_step_on_all(
    norm: str, optimizer: Dict[str, Any]
) -> None:
    """The last rank's gradient alone has it; beside a run that never saw these steps."""
    config = from_dict({"batch_norm": norm, "optimizer": {"lr": 0.01, **optimizer}})
    net, scale = _net(norm), LossScale(mx.cpu())
    trainer = make_trainer(net, config.optimizer)
    poisoned = False

    def mark(part: str) -> None:
        if part == "ranks" and poisoned and dist.rank() == dist.world_size() - 1:
            net[3].weight.grad()[1, 2] = np.inf

    for step in range(STEPS):
        poisoned = step in OVERFLOWS
        before = _bits(net, trainer)
        train_step(net, trainer, _batch(step, optimizer), config, mark=mark, scale=scale)
        after = _bits(net, trainer)
        assert all(theirs == after for theirs in dist.gather_objects(after))
        assert (before == after) == poisoned
    state = list(scale.read())
    assert dist.gather_objects(state) == [[2.0**13, 3, 3]] * dist.world_size()
    if optimizer.get("name") == "adam":
        return  # its bias correction counts skipped steps
    other = _net(norm)
    trainer = make_trainer(other, config.optimizer)
    for step in set(range(STEPS)) - set(OVERFLOWS):
        train_step(other, trainer, _batch(step, optimizer), config)
    for ours, theirs in zip(net.collect_params().values(), other.collect_params().values()):
        if ours.grad_req != "null":  # three ranks divide by 3 before backward or after it
            np.testing.assert_allclose(
                ours.data().asnumpy(), theirs.data().asnumpy(), rtol=1e-4, atol=1e-6
            )


def _set() -> Tuple[np.ndarray, np.ndarray]:
    draw = np.random.RandomState(0)
    return draw.randint(0, 256, (60, 8, 8)).astype(np.uint8), draw.randint(0, 4, 60)


@pytest.mark.parametrize("norm, mixed", [("local", False), ("sync", False), ("local", True)])
def test_a_run_in_float16_overflows_and_resumes_bit_for_bit(
    norm: str, mixed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scale grows until gradients overflow, again and again; with mixup and EMA too."""
    half.allow(monkeypatch)
    monkeypatch.setattr(loss_scale, "START", 2.0**22)
    monkeypatch.setattr(loss_scale, "GROWS_AFTER", 2)
    folder = dist.broadcast_object(str(tmp_path))
    found = []
    for name, stops in (("whole", [None]), ("parts", [4, 9, None])):
        for stop in stops:
            config = _config(folder, name, norm, stop, mixed)
            fit(config=config, train=_set(), test=_set())
        dist.barrier()
        (state, content), *_ = dist.gather_objects(_saved(config))
        assert state["loss_scale"][2] > 3
        found.append((state["loss_scale"], state["weights"], state["totals"], content))
    assert found[0] == found[1]


def _config(folder: str, name: str, norm: str, stop: Any, mixed: bool) -> Config:
    return from_dict(
        {
            "output": folder,
            "name": name,
            "batch_norm": norm,
            "device": "cpu",
            "model": {"factory": "tests.integration.nets:smooth"},
            "optimizer": {"lr": 0.01, "nesterov": True, "clip_norm": 1.0},
            "train": {
                "epochs": 4,
                "global_batch_size": 17,
                "precision": "float16",
                "max_steps": stop,
                "ema": 0.9 if mixed else None,
            },
            "data": {"mixup": 0.4 if mixed else 0.0},
            "monitor": {"loggers": [], "every_steps": 3},
        }
    )


def _saved(config: Config) -> Any:
    """The state and all arrays of the last checkpoint; on the root."""
    if not dist.is_root():
        return None
    last = checkpoint.listing(config.checkpoint_folder)[-1]
    state = checkpoint.read_state(last)
    kept = {"loss_scale": state.loss_scale, "weights": state.weights, "totals": state.totals}
    arrays = mx.nd.load(str(last / checkpoint.OPTIMIZER))
    return kept, {name: array.asnumpy().tobytes().hex() for name, array in sorted(arrays.items())}

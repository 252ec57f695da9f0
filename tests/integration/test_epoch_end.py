"""What can happen at the end of an epoch, early stopping, and the user's functions in a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn

import launch
from launch.local.function import RankError
from trainer import checkpoint
from trainer.config import Data, from_dict
from trainer.report.result import read, write_result
from trainer.run.loop import fit
from trainer.run.outcome import EpochEnd, Plateau, Result

EPOCHS, EPOCH_STEPS = 12, 3
DRAW = np.random.RandomState(0)
# Labels without a pattern, so that the accuracy rises slowly, and not in every epoch.
SET = DRAW.randint(0, 256, (60, 6, 6)).astype(np.uint8), DRAW.randint(0, 4, 60)


class Done(NamedTuple):
    """A run, what its callback was told, and its weights."""

    result: Result
    ends: List[EpochEnd]
    weight: np.ndarray

    @property
    def told(self) -> List[Tuple]:
        return [figures(end) for end in self.ends]


def figures(end: EpochEnd) -> Tuple:
    """What can be compared."""
    return end.epoch, end.step, end.training, end.evaluation and end.evaluation.accuracy


def trained(
    folder: Path, patience: Optional[int] = None, net: Optional[gluon.Block] = None, **others: Any
) -> Done:
    train = {"epochs": EPOCHS, "global_batch_size": 20, "patience": patience}
    train.update({name: others.pop(name, None) for name in ("max_steps", "max_minutes")})
    monitor = {"loggers": [], "log_format": "json"}
    config = from_dict({"output": str(folder), "train": train, "monitor": monitor, **others})
    net, ends = net or nn.Dense(4), []
    result = fit(net, config, train=SET, test=SET, on_epoch_end=ends.append)
    weight = next(iter(net.collect_params().values())).data().asnumpy()
    return Done(result, ends, weight)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """All epochs, without early stopping."""
    return trained(tmp_path_factory.mktemp("straight"))


@pytest.fixture(scope="module")
def last_epoch(straight: Done) -> int:
    """The one after which a patience of 1 ends the run."""
    plateau = Plateau()
    for end in straight.ends:
        plateau = plateau.after(end.evaluation.accuracy)
        if plateau.outlasts(1):
            break
    assert 2 < end.epoch < EPOCHS
    return end.epoch


def told(capsys: Any, event: str) -> List[Dict[str, Any]]:
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines if line["event"] == event]


def test_each_epoch_is_told_with_its_evaluation_where_there_is_one(tmp_path: Path) -> None:
    ends = trained(tmp_path, evaluate={"every_epochs": 5}, max_steps=32).ends
    assert [end.epoch for end in ends] == [*range(1, 11), 11]
    assert [end.step for end in ends] == [*range(3, 31, 3), 32]
    assert [end.epoch for end in ends if end.evaluation is not None] == [5, 10, 11]


def test_a_run_ends_early_and_goes_on_with_more_patience(
    tmp_path: Path, capsys: Any, straight: Done, last_epoch: int
) -> None:
    stopped = trained(tmp_path, patience=1)
    assert stopped.result.stopped_early and not stopped.result.stopped
    assert stopped.result.steps == last_epoch * EPOCH_STEPS
    assert stopped.told == straight.told[:last_epoch]
    (end,) = told(capsys, "end")
    assert (end["state"], end["last_step"]) == ("stopped early", EPOCHS * EPOCH_STEPS)
    listed = read(tmp_path / "default")
    assert (listed.state, listed.step) == ("stopped early", stopped.result.steps)

    again = trained(tmp_path, patience=1)
    assert again.ends == [] and again.result.stopped_early
    assert again.result.steps == stopped.result.steps
    assert again.result.evaluation.accuracy == stopped.result.evaluation.accuracy
    assert told(capsys, "end")[0]["state"] == "stopped early"
    assert read(tmp_path / "default") == listed

    # As after a kill between the last save and the writing of the result.
    write_result(tmp_path / "default", state="unfinished", step=0)
    trained(tmp_path, patience=1)
    assert read(tmp_path / "default").state == "stopped early"

    finished = trained(tmp_path)
    assert finished.told == straight.told[last_epoch:]
    assert not finished.result.stopped_early
    assert finished.weight.tobytes() == straight.weight.tobytes()
    assert read(tmp_path / "default").state == "done"


def test_a_run_made_in_stages_ends_at_the_same_step(tmp_path: Path, last_epoch: int) -> None:
    """Each stage ends within an epoch, with an evaluation that an undisturbed run has not."""
    for stage in range(1, last_epoch):
        step = stage * EPOCH_STEPS + 1
        assert trained(tmp_path, patience=1, max_steps=step).result.steps == step
    assert trained(tmp_path, patience=1).result.steps == last_epoch * EPOCH_STEPS


def test_a_run_that_ends_early_is_calibrated(tmp_path: Path, capsys: Any) -> None:
    net = nn.HybridSequential()
    net.add(nn.BatchNorm(), nn.Dense(4))
    train = {"optimizer": {"lr": 1e-9}, "calibrate_samples": len(SET[0])}
    done = trained(tmp_path, patience=1, net=net, **train)
    assert done.result.stopped_early
    data = (SET[0] / 255 - Data().mean) / Data().std
    running_mean = net[0].running_mean.data().asscalar()
    assert running_mean == pytest.approx(data.mean(), rel=1e-5)
    evaluated = told(capsys, "evaluation")
    assert [event["step"] for event in evaluated[-2:]] == [done.result.steps] * 2
    assert done.ends[-1].evaluation.loss == evaluated[-1]["loss"] != evaluated[-2]["loss"]


def test_the_plateau_of_the_learning_rate_is_resumed_exactly(tmp_path: Path) -> None:
    settings = {
        "schedule": {"name": "plateau", "patience": 1, "gamma": 0.5},
        "optimizer": {"lr": 1.0},
    }
    whole = trained(tmp_path / "whole", **settings)
    accuracies = [end.evaluation.accuracy for end in whole.ends]
    reduced = [b <= max(accuracies[: i + 1]) for i, b in enumerate(accuracies[1:])]
    assert 1 < sum(reduced) < EPOCHS - 1
    newest = checkpoint.listing(tmp_path / "whole" / "default" / "checkpoints")[-1]
    state = checkpoint.read_state(newest)
    assert state.plateau[2] == sum(reduced)
    for step in (7, 20, None):
        parts = trained(tmp_path / "parts", max_steps=step, **settings)
    assert parts.weight.tobytes() == whole.weight.tobytes()


def test_a_run_whose_time_is_up_saves_and_resumes(tmp_path: Path, straight: Done) -> None:
    for made in range(1, 4):  # a step each time
        stopped = trained(tmp_path, max_minutes=1e-6)
        assert stopped.result.stopped and stopped.result.steps == made
    assert read(tmp_path / "default").state == "stopped"
    assert trained(tmp_path).weight.tobytes() == straight.weight.tobytes()


def on_ranks(folder: str, data: Any, failing: Optional[int]) -> Any:
    from mxnet.gluon import nn

    from trainer import dist
    from trainer.config import from_dict
    from trainer.run.loop import fit

    ends = []

    def on_epoch_end(end: Any) -> None:
        ends.append((*end[:3], end.evaluation.accuracy))
        if dist.rank() == failing and end.epoch == 2:
            raise RuntimeError("the service is down")

    train = {"epochs": 12, "global_batch_size": 20, "patience": 1}
    config = from_dict({"output": folder, "train": train, "monitor": {"loggers": []}})
    net = nn.Dense(4)
    result = fit(net, config, train=data, test=data, on_epoch_end=on_epoch_end)
    return ends, result.steps


def test_all_ranks_are_told_the_same_and_end_at_the_same_step(
    tmp_path: Path, straight: Done, last_epoch: int
) -> None:
    """A rank whose function fails ends the job; the run resumes after that epoch."""
    with pytest.raises(RankError, match="rank 1 ended .*") as raised:
        launch.run(on_ranks, (str(tmp_path), SET, 1), ranks=2)
    assert "RuntimeError: the service is down" in str(raised.value)
    (ends, steps), (others, other_steps) = launch.run(on_ranks, (str(tmp_path), SET, None), ranks=2)
    assert ends == others and steps == other_steps == last_epoch * EPOCH_STEPS
    for end, expected in zip(ends, straight.told[2:last_epoch]):
        assert end[:2] == expected[:2] and end[3] == expected[3]
        assert tuple(end[2]) == pytest.approx(tuple(expected[2]), rel=1e-5)


def on_ranks_with_all(folder: str, data: Any) -> Any:
    from mxnet import nd
    from mxnet.gluon import nn

    from trainer.config import from_dict
    from trainer.run.loop import fit

    calls: List[Any] = []
    train = {"epochs": 2, "global_batch_size": 20}
    config = from_dict({"output": folder, "train": train, "monitor": {"loggers": []}})
    fit(
        nn.Dense(4),
        config,
        train=data,
        test=data,
        metrics={"label": lambda scores, label: label + 0 * nd.pick(scores, label)},
        on_step=lambda end: calls.append(
            ("step", end.epoch, end.step, end.lr, end.samples, end.result.loss_sum.asscalar())
        ),
        on_evaluation=lambda end: calls.append(("evaluation", end.step, end.set, end.evaluation)),
        on_epoch_end=lambda end: calls.append(("epoch", end.step, end.training.loss)),
    )
    return calls


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_step_and_evaluation_is_told_on_every_rank(tmp_path: Path, ranks: int) -> None:
    told = launch.run(on_ranks_with_all, (str(tmp_path), SET), ranks=ranks)
    for calls in told:
        kinds = [call[0] for call in calls]
        assert kinds == 2 * [*["step"] * EPOCH_STEPS, "evaluation", "epoch"]
        steps = [call[1:4] for call in calls if call[0] == "step"]
        assert [step[:2] for step in steps] == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]
        assert steps[0][2] == 0.1 > steps[-1][2]
        evaluations = [call[1:] for call in calls if call[0] == "evaluation"]
        assert [(step, name) for step, name, _ in evaluations] == [(3, "test"), (6, "test")]
        assert evaluations[-1][2].metrics == {"label": pytest.approx(SET[1].mean())}
    for number in range(EPOCH_STEPS, EPOCH_STEPS + 2):  # the same on all ranks
        assert len({repr(calls[number]) for calls in told}) == 1
    samples = sum(calls[step][4] for calls in told for step in range(EPOCH_STEPS))
    losses = sum(calls[step][5] for calls in told for step in range(EPOCH_STEPS))
    assert samples == len(SET[0])
    assert losses / samples == pytest.approx(told[0][EPOCH_STEPS + 1][2], rel=1e-5)


def test_an_exception_in_a_step_ends_the_run(tmp_path: Path) -> None:
    def fail(end: Any) -> None:
        raise RuntimeError(f"at step {end.step}")

    config = from_dict({"output": str(tmp_path), "monitor": {"loggers": []}})
    with pytest.raises(RuntimeError, match="at step 1"):
        fit(nn.Dense(4), config, train=SET, test=SET, on_step=fail)

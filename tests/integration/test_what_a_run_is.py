"""A run is what it was made with: other images, nets or losses are not resumed as its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn

import launch
from launch.local.function import RankError
from trainer import Config, fit
from trainer.checkpoint import CheckpointError, listing
from trainer.config import Monitor, Train
from trainer.inference import export, trained_model
from trainer.model import resnet18
from trainer.run import agreement

from .commands import run, trainer


def config(folder: Any, **settings: Any) -> Config:
    return Config(
        output=str(folder),
        name="fold",
        train=Train(epochs=1, global_batch_size=20),
        monitor=Monitor(loggers=()),
        **settings,
    )


def sets(seed: int) -> Dict[str, Any]:
    """Noise of four classes."""
    draw = np.random.RandomState(seed)
    images, labels = draw.randint(0, 256, (60, 6, 6)).astype(np.uint8), np.arange(60) % 4
    return {"train": (images[:40], labels[:40]), "test": (images[40:], labels[40:])}


def net(units: int = 4) -> gluon.Block:
    made = nn.HybridSequential()
    made.add(nn.Dense(units), nn.Dense(4))
    return made


def frozen() -> gluon.Block:
    made = net()
    made[0].collect_params().setattr("grad_req", "null")
    return made


def hinge(scores: Any, labels: Any) -> Any:
    return mx.nd.relu(1 - mx.nd.pick(scores, labels))


def with_dropout(rate: float, lr_mult: float = 1) -> gluon.Block:
    made = net()
    made.add(nn.Dropout(rate))
    made[0].collect_params().setattr("lr_mult", lr_mult)
    return made


def partly_given(seed: int) -> gluon.Block:
    made = nn.HybridSequential()
    made.add(nn.Dense(5, in_units=36), nn.Dense(4))
    made[0].initialize(mx.init.Constant(seed / 100))
    return made


WEIGHTS = mx.nd.array([1, 1, 4, 1])


def weighted(scores: Any, labels: Any) -> Any:
    return hinge(scores, labels) * WEIGHTS[labels]


def given(seed: int) -> gluon.Block:
    made = net()
    made.initialize(mx.init.Constant(seed / 100))
    made(mx.nd.zeros((1, 1, 6, 6)))
    return made


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({**sets(2)}, "other training images; other test images"),
        ({"train": sets(1)["train"], "test": sets(2)["test"]}, "other test images"),
        ({"train": (sets(1)["train"][0], 3 - sets(1)["train"][1])}, "other training labels"),
        ({"net": net(5)}, "other net; other layers or multipliers"),
        ({"net": frozen()}, "other net"),
        ({"loss": hinge}, "other loss"),
        ({"net": given(2)}, "other initial weights"),
    ],
)
def test_a_second_fold_is_not_the_first(tmp_path: Any, second: Any, words: str) -> None:
    first: Dict[str, Any] = {"loss": gluon.loss.SoftmaxCrossEntropyLoss(), **sets(1)}
    own = given(1) if words == "other initial weights" else net()
    fit(own, config(tmp_path), **first)
    again = {**first, **second}
    again.setdefault("net", net())
    with pytest.raises(CheckpointError, match=rf'\({words}\).*another name=.*resume="none"'):
        fit(again.pop("net"), config(tmp_path), **again)
    assert len(listing(tmp_path / "fold" / "checkpoints")) == 1, "nothing was changed"


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"loss": hinge}, "other loss"),
        ({"validation": sets(3)["test"]}, "other validation images; other validation labels"),
        ({"test": sets(1)["test"]}, "other test images; other test labels"),
    ],
)
@pytest.mark.parametrize("given_first", [True, False])
def test_what_only_one_of_two_runs_was_given_tells_them_apart(
    tmp_path: Any, part: Any, words: str, given_first: bool
) -> None:
    least = {"train": sets(1)["train"]}
    runs = [{**least, **part}, least] if given_first else [least, {**least, **part}]
    fit(net(), config(tmp_path), **runs[0])
    with pytest.raises(CheckpointError, match=words):
        fit(net(), config(tmp_path), **runs[1])


def test_dropout_multipliers_and_a_part_of_the_weights_tell_runs_apart(tmp_path: Any) -> None:
    for kind, first, *others in (
        ("layers or multipliers", with_dropout(0.1), with_dropout(0.9), with_dropout(0.1, 10)),
        ("initial weights", partly_given(1), partly_given(2)),
    ):
        folder = tmp_path / kind.split()[0]
        fit(first, config(folder), **sets(1))
        for other in others:
            with pytest.raises(CheckpointError, match=rf"\(other {kind}\)"):
                fit(other, config(folder), **sets(1))


def test_class_weights_in_a_global_variable_are_part_of_a_loss(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(net(), config(tmp_path), loss=weighted, **sets(1))
    assert fit(net(), config(tmp_path), loss=weighted, **sets(1)).steps == 2
    monkeypatch.setitem(globals(), "WEIGHTS", mx.nd.array([1, 1, 400, 1]))
    with pytest.raises(CheckpointError, match="other loss"):
        fit(net(), config(tmp_path), loss=weighted, **sets(1))


def test_runs_of_earlier_versions_which_compared_less_are_resumed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_net = agreement.of_net
    with monkeypatch.context() as earlier:
        earlier.setattr(agreement, "of_net", lambda net: {"net": of_net(net)["net"]})
        earlier.setattr(agreement, "of_loss", lambda loss, net: {"loss": "0f"})
        fit(net(), config(tmp_path), loss=hinge, **sets(1))
    assert fit(net(), config(tmp_path), loss=hinge, **sets(1)).steps == 2
    with pytest.raises(CheckpointError, match=r"\(other loss\)"):
        fit(net(), config(tmp_path), **sets(1))
    with pytest.raises(CheckpointError, match="other net"):
        fit(frozen(), config(tmp_path), loss=hinge, **sets(1))


def test_weights_that_a_resume_replaces_are_told_of(
    tmp_path: Any, capfd: pytest.CaptureFixture
) -> None:
    told = "warning: the net's own weights are replaced by those of the checkpoint"
    own = net()
    for again, said in ((own, False), (own, False), (net(), False), (given(2), True)):
        fit(again, config(tmp_path), **sets(1))
        assert (told in capfd.readouterr().err) == said


def test_the_same_parts_made_anew_are_the_same_run(tmp_path: Any) -> None:
    for _ in range(2):
        [nn.Dense(1) for _ in range(9)]
        result = fit(
            given(1), config(tmp_path), loss=gluon.loss.SoftmaxCrossEntropyLoss(), **sets(1)
        )
    assert result.steps == 2


def test_a_net_that_holds_what_was_saved_goes_on(tmp_path: Any) -> None:
    """As in a notebook, where the cell is run again after it was interrupted."""
    own = given(1)
    fit(own, config(tmp_path), **sets(1))
    assert fit(own, config(tmp_path), **sets(1)).steps == 2


def test_fit_leaves_the_users_generators_where_they_were(tmp_path: Any) -> None:
    np.random.seed(5)
    expected = np.random.uniform(size=3)
    np.random.seed(5)
    rates = []
    for trial in range(3):
        rates.append(np.random.uniform())
        fit(net(), config(tmp_path, seed=trial), resume="none", **sets(1))
    np.testing.assert_array_equal(rates, expected)


class Noisy(gluon.Block):
    """Draws from NumPy in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Dense(4)

    def forward(self, x: mx.nd.NDArray) -> mx.nd.NDArray:
        return self.body(x * float(np.random.uniform(0.5, 1.5)))


def test_numbers_that_a_forward_draws_from_numpy_are_resumed(tmp_path: Any) -> None:
    def trained(name: str, *ends: int) -> np.ndarray:
        for end in ends:
            own = Noisy()
            train = Train(epochs=3, global_batch_size=20, max_steps=end)
            settings = config(tmp_path)
            fit(own, Config(**{**vars(settings), "name": name, "train": train}), **sets(1))
            np.random.uniform(size=end)  # whatever happens between
        return own.body.weight.data().asnumpy()

    np.testing.assert_array_equal(trained("whole", 6), trained("parts", 3, 6))


class Reversed(gluon.HybridBlock):
    """The default net's parameters, and another forward."""

    def __init__(self) -> None:
        super().__init__()

        own = resnet18()
        for name, child in own._children.items():
            self.register_child(child, name)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        for child in self._children.values():
            x = child(x)
        return -x


def test_a_net_of_the_same_shapes_and_another_function_is_refused(tmp_path: Any) -> None:
    sample = ["data.dataset=fashion_mnist_sample", "train.max_steps=2"]
    from trainer.config import from_dict

    settings = from_dict({}, [*sample, f"output={tmp_path}", "name=run"])
    own = Reversed()
    seen = fit(own, settings).evaluation
    assert seen is not None
    for command in ("evaluate", "export", "predict"):
        more = {"export": [f"--output={tmp_path}/out"], "predict": [str(tmp_path)]}
        done = run(trainer(command, str(tmp_path / "run"), *more.get(command, [])))
        assert done.code == 2 and "gives other scores; the net was given to fit()" in done.err
    saved = trained_model.load(str(tmp_path / "run"), net=Reversed())
    assert trained_model.evaluate_saved(saved).accuracy == seen.accuracy
    with pytest.raises(CheckpointError, match="gives other scores; resume with that one, give the"):
        fit(resnet18(), settings)
    again = fit(Reversed(), settings).evaluation
    assert again is not None and again.accuracy == seen.accuracy
    forced = fit(resnet18(), settings, force=True).evaluation
    assert forced is not None and forced.loss != seen.loss


def test_export_compares_with_the_recorded_accuracy(tmp_path: Any) -> None:
    sample = ["data.dataset=fashion_mnist_sample", "train.max_steps=2"]
    small = ["model.factory=tests.integration.nets:small"]
    done = run(trainer("train", *sample, *small, f"output={tmp_path}", "name=run"))
    assert done.code == 0, done.err
    (path,) = listing(tmp_path / "run" / "checkpoints")
    saved = trained_model.load(str(path), trust=True)
    seen = trained_model.evaluate_saved(saved)
    export.check_accuracy(saved, seen)
    with pytest.raises(CheckpointError, match="accuracy .* was recorded"):
        export.check_accuracy(saved._replace(accuracy=seen.accuracy + 0.05), seen)
    assert json.loads((path / "state.json").read_text())["answers"]


def test_ranks_whose_nets_compute_different_functions_are_refused(tmp_path: Path) -> None:
    def train(folder: str) -> None:
        from mxnet.gluon import nn

        from tests.integration.test_what_a_run_is import config, sets
        from trainer import fit
        from trainer.dist import environment

        net = nn.HybridSequential()
        net.add(nn.HybridLambda(lambda F, x: x ** (1 + environment.rank())), nn.Dense(4))
        fit(net, config(folder), **sets(1))

    with pytest.raises(RankError, match="compute different functions: .* that on rank 1"):
        launch.run(train, (str(tmp_path),), ranks=2)
    assert not list(tmp_path.iterdir())


def test_a_forward_that_parts_the_ranks_is_noticed_before_it_is_saved(tmp_path: Path) -> None:
    """Here the callback does it, on one rank, after the first of two epochs."""

    def train(folder: str) -> None:
        import mxnet as mx

        from tests.integration.test_what_a_run_is import config, given, sets
        from trainer import dist, fit
        from trainer.config import Train

        own = given(1)

        def part(end: Any) -> None:
            if dist.rank() == 1:
                own[1].bias.set_data(own[1].bias.data() + mx.nd.ones(4))

        settings = replace(config(folder), train=Train(epochs=2, global_batch_size=20))
        fit(own, settings, on_epoch_end=part, **sets(1))

    with pytest.raises(RankError, match=r"parted after 4 steps: 1\.bias on rank 1"):
        launch.run(train, (str(tmp_path),), ranks=2)
    kept = [path.name for path in listing(tmp_path / "fold" / "checkpoints")]
    assert kept == ["step-00000002"], "what has parted is not saved"

"""Whole runs, on one process, of nets unlike the seed's that Gluon allows."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any, Dict

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from trainer.batch_norm import running_statistics
from trainer.config import from_dict
from trainer.data.sources.base import ArraySource
from trainer.errors import ConfigError
from trainer.inference import export, predict, trained_model
from trainer.inference.images import Images
from trainer.model import prepare
from trainer.run.loop import fit
from trainer.run.outcome import Result, TrainingError

DRAW = np.random.RandomState(0)
SET = DRAW.randint(0, 256, (12, 6, 6)).astype(np.uint8), np.arange(12) % 4

KNOWN = (mx.cpu(), (6, 6), [*"0123"], None, None)  # of a saved net


def trained(net: gluon.Block, folder: Path, loss: Any = None, **settings: Any) -> Result:
    config = {"output": str(folder), "train": {"epochs": 1, "global_batch_size": 4}, **settings}
    return fit(net, from_dict(config), loss=loss, train=SET, test=SET)


class OwnForward(gluon.HybridBlock):
    """A HybridBlock that Gluon does not compile: its forward works on arrays only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Dense(4)

    def forward(self, x: mx.nd.NDArray) -> mx.nd.NDArray:
        return self.head(x.as_in_context(x.context))


class Double(gluon.HybridBlock):
    """A net that computes in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2D(2, kernel_size=3)
        self.norm, self.head = nn.BatchNorm(), nn.Dense(4)
        self.cast("float64")

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return self.head(self.norm(self.conv(F.cast(x, "float64"))))


class TwoHeads(gluon.Block):
    """One output in inference, two in training, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.other = nn.Dense(4), nn.Dense(4, in_units=36)

    def forward(self, x: mx.nd.NDArray) -> Any:
        return (self.head(x), self.other(x)) if autograd.is_training() else self.head(x)


def test_a_net_that_cannot_be_drawn_is_trained(tmp_path: Path, capsys: Any) -> None:
    assert trained(OwnForward(), tmp_path).steps == 3
    said = "".join(capsys.readouterr())
    assert "no graph of the net in TensorBoard: AttributeError" in said
    assert "list runs:" in said and "higher accuracy" not in said, "it has other images"


def test_a_complete_run_says_that_it_does_not_train(tmp_path: Path, capsys: Any) -> None:
    trained(nn.Dense(4), tmp_path)
    assert "To train anew" not in "".join(capsys.readouterr())
    trained(nn.Dense(4), tmp_path)
    assert 'To train anew, give another name=... or --resume none (in Python resume="none")' in (
        "".join(capsys.readouterr())
    )


class Ending(nn.HybridSequential):
    """A net of one layer and a last function of its scores."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self.add(nn.Dense(4), nn.HybridLambda(function))


@pytest.mark.parametrize(
    ("net", "loss", "told"),
    [
        (lambda: Ending("softmax"), None, True),
        (lambda: Ending("softmax"), gluon.loss.SoftmaxCrossEntropyLoss(), True),
        (lambda: Ending("softmax"), lambda p, label: -mx.nd.log(p.pick(label, axis=1)), False),
        (lambda: Ending("log_softmax"), None, False),
        (lambda: Ending("log_softmax"), gluon.loss.SoftmaxCELoss(from_logits=True), False),
        (lambda: nn.Dense(4), None, False),
    ],
)
def test_a_second_softmax_is_told_of(
    tmp_path: Path, capfd: Any, net: Any, loss: Any, told: bool
) -> None:
    trained(net(), tmp_path, loss)
    said = capfd.readouterr().err
    assert said.count("the loss takes their softmax once more") == told, said


def test_probabilities_of_a_net_are_predicted_as_they_are(tmp_path: Path) -> None:
    net = Ending("softmax")
    net.initialize(mx.init.Normal(0.1))
    model = trained_model.Saved(tmp_path, from_dict({}), net, mx.cpu(), (6, 6), list("abcd"), None)
    found = predict.predict(model, Images(["x"] * 12, SET[0], []))
    np.testing.assert_allclose(found.probabilities, trained_model.scores(model, SET[0]), atol=1e-6)


def test_a_net_may_compute_in_float64(tmp_path: Path) -> None:
    net = Double()
    result = trained(net, tmp_path, batch_norm="sync")
    assert result.evaluation is not None and np.isfinite(result.evaluation.loss)
    assert net.head.weight.data().dtype == np.float64


class Logarithm(gluon.HybridBlock):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Dense(4)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return F.log(self.head(x) - 1e9)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (OwnForward, "OwnForward has a forward of its own, .* hybrid_forward"),
        (Double, "ONNX Runtime cannot run this net: .*; use --no-onnx"),
    ],
)
def test_what_cannot_be_exported_is_reported_in_one_line(
    tmp_path: Path, make: Any, expected: str
) -> None:
    net = make()
    trained(net, tmp_path / "runs")
    model = trained_model.Saved(
        tmp_path, from_dict({}), net, mx.cpu(), (6, 6), [*"0123"], None, None
    )
    with pytest.raises(export.ExportError, match=expected) as raised:
        export.export(model, ArraySource(*SET), tmp_path / "exported")
    assert "\n" not in str(raised.value)


def test_a_net_that_is_nan_from_the_start_is_not_blamed_on_the_learning_rate(
    tmp_path: Path,
) -> None:
    with pytest.raises(TrainingError, match="not finite at step 0; .* own arithmetic"):
        trained(Logarithm(), tmp_path)


class Centred(gluon.HybridBlock):
    """Keeps a statistic as the book's batch norm does (section 5.10): in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.mean = nn.Dense(4), mx.nd.zeros((1, 36))

    def forward(self, x: mx.nd.NDArray) -> mx.nd.NDArray:
        if autograd.is_training():
            self.mean = 0.9 * self.mean + 0.1 * x.flatten().mean(axis=0, keepdims=True)
        return self.head(x.flatten() - self.mean)


def test_statistics_that_would_not_be_saved_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training changes mean, .* as a parameter"):
        trained(Centred(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_nan_weights_hidden_by_a_relu_are_reported(tmp_path: Path) -> None:
    net = nn.HybridSequential()
    nowhere = mx.init.Constant(float("nan"))
    net.add(nn.Conv2D(4, kernel_size=3, weight_initializer=nowhere), nn.Activation("relu"))
    net.add(nn.Dense(4))
    with pytest.raises(TrainingError, match="weights were found not finite at step 2; nothing was"):
        trained(net, tmp_path)


def test_a_run_that_failed_leaves_nothing_open(tmp_path: Path) -> None:
    """A notebook keeps the error, and with its traceback everything the failed run refers to."""
    with pytest.raises(TrainingError) as kept:
        trained(Logarithm(), tmp_path)
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    opened = [os.readlink(link) for link in links if os.path.islink(link)]
    assert not [path for path in opened if path.startswith(str(tmp_path))]
    assert trained(OwnForward(), tmp_path).steps == 3, kept


def test_two_outputs_in_training_are_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in training the net gives a tuple") as raised:
        trained(TwoHeads(), tmp_path)
    assert "\n" not in str(raised.value)


def test_a_custom_loss_is_minimized(tmp_path: Path) -> None:
    """Three times the usual loss makes steps three times as large."""
    usual, net = nn.Dense(4), nn.Dense(4)
    loss = gluon.loss.SoftmaxCrossEntropyLoss(weight=3)
    whole = trained(usual, tmp_path, name="usual", optimizer={"lr": 0.03})
    own = trained(net, tmp_path, loss, name="own", optimizer={"lr": 0.01})
    assert whole.evaluation is not None and own.evaluation is not None
    assert own.evaluation.loss == pytest.approx(3 * whole.evaluation.loss, rel=1e-4)
    np.testing.assert_allclose(net.weight.data().asnumpy(), usual.weight.data().asnumpy(), 1e-4)


def on_an_imported_body(folder: Path) -> gluon.Block:
    body, net = nn.HybridSequential(prefix="body_"), nn.HybridSequential()
    with body.name_scope():
        body.add(nn.Conv2D(2, kernel_size=3), nn.BatchNorm())
    body.initialize()
    body.hybridize()
    body(mx.nd.zeros((1, 1, 6, 6)))
    body.export(str(folder / "body"))
    files = str(folder / "body-symbol.json"), ["data"], str(folder / "body-0000.params")
    net.add(gluon.SymbolBlock.imports(*files), nn.Dense(4))
    return net


@pytest.mark.filterwarnings("ignore:Cannot decide type")  # MXNet's, of a symbol's input
def test_an_imported_net_can_be_trained_on(tmp_path: Path) -> None:
    net = on_an_imported_body(tmp_path)
    before = {name: p.data().asnumpy() for name, p in net[0].collect_params().items()}
    trained(net, tmp_path / "runs")
    after = {name: p.data().asnumpy() for name, p in net[0].collect_params().items()}
    assert not any(np.array_equal(before[name], after[name]) for name in before)
    found = [p.name for p in running_statistics.parameters(net)]
    assert found == ["body_batchnorm0_running_mean", "body_batchnorm0_running_var"]
    for settings in ({"batch_norm": "sync"}, {"calibrate_samples": 4}):
        with pytest.raises(ConfigError, match="body_batchnorm0_running_mean belongs to a SymbolBl"):
            trained(net, tmp_path / "runs", name="refused", **settings)
    model = trained_model.Saved(
        tmp_path, from_dict({}), net, mx.cpu(), (6, 6), [*"0123"], None, None
    )
    with pytest.raises(ConfigError, match="cannot be calibrated: .* belongs to a SymbolBlock"):
        trained_model.calibrate_saved(model, train=SET)
    with pytest.raises(ConfigError, match=r"net\.add"):
        trained(net[0], tmp_path / "runs", name="refused")


def prepared(*layers: gluon.HybridBlock) -> trained_model.Saved:
    net = nn.HybridSequential()
    net.add(*layers, nn.Dense(4))
    prepare.prepare_net(net, from_dict({}), (1, 6, 6), mx.cpu())
    return trained_model.Saved(
        Path("run"), from_dict({}), net, mx.cpu(), (6, 6), [*"0123"], None, None
    )


def test_layer_norm_is_exported_without_a_word_of_onnx_runtimes(tmp_path: Path, capfd: Any) -> None:
    files = export.export(prepared(nn.LayerNorm(), nn.GELU()), ArraySource(*SET), tmp_path)
    assert [file.name for file in files] == [export.SYMBOL, export.ONNX]
    assert "".join(capfd.readouterr()) == ""


def test_what_mxnet_cannot_translate_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(
        export.ExportError, match="as ONNX: .* axis != 1 .*; use --no-onnx"
    ) as raised:
        export.export(prepared(nn.BatchNorm(axis=3)), ArraySource(*SET), tmp_path)
    assert "\n" not in str(raised.value)


def conv_and_norm() -> gluon.Block:
    """A part of it is compiled, in its own way; its last layer has multipliers of its own."""
    net, body = nn.HybridSequential(), nn.HybridSequential()
    body.add(nn.Conv2D(2, kernel_size=3), nn.BatchNorm())
    body.hybridize(inline_limit=5)
    net.add(body, nn.Dense(4))
    net[1].bias.wd_mult, net[1].bias.lr_mult = 0.5, 2.0
    return net


def attributes(net: gluon.Block) -> Any:
    """Everything about a net that is not the values of its parameters."""
    blocks: Any = []
    net.apply(lambda block: blocks.append((type(block), vars(block).get("_flags"), *vars(block))))
    parameters = net.collect_params().values()
    return blocks, [(p.grad_req, p.wd_mult, p.lr_mult, p._trainer) for p in parameters]


@pytest.mark.parametrize(
    ("loss", "error"), [(None, None), (lambda scores, label: scores[:, 0] / 0, TrainingError)]
)
def test_only_the_weights_of_a_net_change(tmp_path: Path, loss: Any, error: Any) -> None:
    net = conv_and_norm()
    before = attributes(net)
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        trained(net, tmp_path, loss, batch_norm="sync", optimizer={"accumulate": 2})
    assert attributes(net) == before
    pickle.dumps(net)


def test_frozen_layers_stay_and_others_learn_at_their_own_rate(tmp_path: Path) -> None:
    """As when a net is fine-tuned."""
    first = nn.HybridSequential()
    first.add(nn.Conv2D(2, kernel_size=3), nn.BatchNorm(), nn.Dense(4))
    trained(first, tmp_path, name="first")
    moved: Dict[int, np.ndarray] = {}
    for rate in (1, 10):
        mx.random.seed(0)
        net = nn.HybridSequential()
        net.add(*first[:-1], nn.Dense(4, in_units=32))
        net[-1].initialize()
        net[:2].collect_params().setattr("grad_req", "null")
        net[-1].collect_params().setattr("lr_mult", rate)
        kept = [p.data().asnumpy() for p in net[:2].collect_params().values()]
        head = net[-1].weight.data().asnumpy()
        trained(net, tmp_path, name=f"rate{rate}", train={"epochs": 1, "global_batch_size": 12})
        for parameter, before in zip(net[:2].collect_params().values(), kept):
            assert (parameter.data().asnumpy() == before).all(), parameter.name
        moved[rate] = net[-1].weight.data().asnumpy() - head
    np.testing.assert_allclose(moved[10], 10 * moved[1], rtol=1e-3, atol=1e-6)


class OfDistances(gluon.HybridBlock):
    """A loss that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Dense(4, in_units=4)

    def hybrid_forward(self, F: Any, scores: Any, label: Any) -> Any:
        return F.pick(self.centres(scores) ** 2, label)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (OfDistances(), "the loss has parameters of its own .*_weight, .*_bias.*, which fit would"),
        (lambda scores, label: scores.sum(), r"the loss gives \(1,\) for 2 samples and \(1,\) for"),
        (lambda scores, label: scores[:, :2].mean(axis=0), r"gives \(2,\) .* and \(2,\) for one"),
        (gluon.loss.L2Loss, r"the loss is the class L2Loss; give an instance of it, L2Loss\(\)"),
        (
            lambda scores, label: mx.nd.array(scores.asnumpy().sum(axis=1)),
            r"the loss has no gradient with respect to the scores: .* not in a computational graph",
        ),
        (lambda scores, label: label[5], r"the loss cannot take .*: IndexError.*test_any_net\.py"),
    ],
)
def test_an_invalid_loss_is_reported_before_anything_starts(
    tmp_path: Path, loss: Any, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as raised:
        trained(nn.Dense(4), tmp_path, loss)
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("attribute", ["grad_req", "lr_mult", "wd_mult"])
def test_layers_are_not_frozen_nor_thawed_in_mid_run(attribute: str, tmp_path: Path) -> None:
    """A resumed run would not do so, its averages would leave them out, and they would decay."""
    net = nn.HybridSequential()
    net.add(nn.Dense(4, in_units=36), nn.Dense(4, in_units=4))
    net[0].collect_params().setattr("grad_req", "null")

    def change(end: Any) -> None:
        net[0].collect_params().setattr(attribute, "write" if attribute == "grad_req" else 0.5)

    config = from_dict({"output": str(tmp_path), "train": {"epochs": 2, "global_batch_size": 4}})
    with pytest.raises(ConfigError, match=r"dense\d+_weight has been frozen, .* in mid-run"):
        fit(net, config, train=SET, test=SET, on_epoch_end=change)


@pytest.mark.parametrize("over_batch", [False, True])
def test_a_loss_that_depends_on_the_rest_of_the_batch_is_told_of(
    over_batch: bool, tmp_path: Path, capsys: Any
) -> None:
    """On several ranks each would have a batch of its own."""
    cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()

    def loss(scores: mx.nd.NDArray, label: mx.nd.NDArray) -> mx.nd.NDArray:
        losses = cross_entropy(scores, label)
        return losses / losses.mean() if over_batch else losses

    trained(nn.Dense(4), tmp_path, loss)
    said = "what the loss gives for a sample depends on the other samples in its batch"
    assert (said in capsys.readouterr().err) == over_batch


@pytest.mark.parametrize("dropout", [False, True])
def test_mxnets_generators_are_seeded_in_each_step_that_may_draw(
    dropout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes milliseconds, which nets without chance need not spend."""
    steps = []
    for epochs in (1, 3):
        seeds = []
        monkeypatch.setattr(mx.random, "seed", seeds.append)
        net = nn.HybridSequential()
        net.add(nn.Dense(8, activation="relu"), *([nn.Dropout(0.5)] * dropout), nn.Dense(4))
        trained(net, tmp_path / str(epochs), train={"epochs": epochs, "global_batch_size": 4})
        steps.append(len(seeds))
    assert steps[1] - steps[0] == (6 if dropout else 0)

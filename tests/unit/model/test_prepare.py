"""Nets are prepared for training, or refused with the reason."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn

from trainer import batch_norm
from trainer.config import Config, Model, Optimizer
from trainer.errors import ConfigError
from trainer.model import prepare


def pooled() -> nn.HybridSequential:
    net = nn.HybridSequential()
    net.add(nn.Conv2D(2, kernel_size=3), nn.AvgPool2D(pool_size=13), nn.Dense(10))
    return net


@pytest.mark.parametrize("hybridize", [True, False])
def test_a_net_that_does_not_fit_the_images_is_reported_in_one_line(hybridize):
    net = pooled()
    if hybridize:
        net.hybridize()
    with pytest.raises(ConfigError) as raised:
        prepare.prepare_net(net, Config(), (1, 8, 8), mx.cpu())
    message = str(raised.value)
    assert "\n" not in message
    for part in ("(1, 8, 8)", "kernel size (13) exceeds input (6", "data.image_size"):
        assert part in message


def test_a_net_that_fits_shows_its_layers():
    layers = prepare.prepare_net(pooled(), Config(), (1, 15, 15), mx.cpu())
    assert [row.output for row in layers][-1] == (1, 10)


class Broken(gluon.Block):
    def forward(self, x):
        raise KeyError("width")


class InAList(gluon.Block):
    """Gluon does not know of layers that are no attributes."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Dense(10)]

    def forward(self, x):
        return self.layers[0](x)


class WithAHeadForTraining(gluon.HybridBlock):
    def __init__(self):
        super().__init__()
        self.head, self.other = nn.Dense(10), nn.Dense(10)

    def hybrid_forward(self, F, x):
        return self.head(x) + self.other(x) if mx.autograd.is_training() else self.head(x)


class Scaled(gluon.HybridBlock):
    def __init__(self):
        super().__init__()
        self.scale = self.params.get("scale", shape=(1,))

    def hybrid_forward(self, F, x, scale):
        return F.broadcast_mul(x, scale)


class Frozen(nn.Dense):
    def __init__(self):
        super().__init__(10)
        self.collect_params().setattr("grad_req", "null")


class Imported(gluon.SymbolBlock):
    def __init__(self):
        data = mx.sym.var("data")
        super().__init__(mx.sym.FullyConnected(data, num_hidden=10, name="dense"), data)


class NamedAlike(nn.HybridSequential):
    def __init__(self):
        super().__init__()
        self.add(nn.Dense(10, prefix="dense_"), nn.Dense(10, prefix="dense_"))


class Pair(gluon.HybridBlock):
    def __init__(self):
        super().__init__()
        self.head = nn.Dense(10)

    def hybrid_forward(self, F, x):
        return self.head(x), x


class LooksAtItsShape(gluon.HybridBlock):
    """It runs as it is, but not as a symbol, which has no shape."""

    def __init__(self):
        super().__init__()
        self.head = nn.Dense(10)

    def hybrid_forward(self, F, x):
        return self.head(x.reshape((x.shape[0], -1)))


class OfItsOwn(nn.BatchNorm):
    def hybrid_forward(self, F, x, *arrays, **named):
        return 2 * super().hybrid_forward(F, x, *arrays, **named)


def cast_to_float16():
    net = pooled()
    net.cast("float16")
    return net


def refusal(net: gluon.Block, **settings) -> str:
    with pytest.raises(ConfigError) as raised:
        prepare.prepare_net(net, Config(**settings), (1, 5, 5), mx.cpu())
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (Broken, "KeyError: 'width' (test_prepare.py, line "),
        (InAList, "_weight' has not been initialized"),
        (WithAHeadForTraining, "_weight in inference, which leaves their shapes unknown"),
        (Scaled, "_scale cannot be drawn: Xavier initializer cannot be applied"),
        (nn.Flatten, "the net has no parameter that is trained"),
        (Frozen, "the net has no parameter that is trained"),
        (Imported, "SymbolBlock"),
        (gluon.contrib.nn.SyncBatchNorm, "waits for other devices of its process"),
        (NamedAlike, "two layers of the net have parameters of one name"),
        (LooksAtItsShape, "the net runs, but not compiled: AttributeError"),
        (cast_to_float16, "the net cannot take float32 images"),
    ],
)
def test_faults_of_the_users_net_are_reported_with_their_place(net, expected):
    assert expected in refusal(net())


IMAGE = prepare.fixed_image((1, 5, 5), mx.cpu())


class Moving(gluon.Block):
    """A batch norm as the book's (section 5.10), and what it has seen last."""

    def __init__(self, in_place=False, kept="mxnet", chance=False):
        super().__init__()
        self.in_place, self.chance, self.seen = in_place, chance, mx.nd.zeros(1)
        self.mean = {"mxnet": mx.nd.zeros(25), "numpy": np.zeros(25), "": None}[kept]
        self.head, self.norm = nn.Dense(3), nn.BatchNorm()

    def forward(self, x):
        self.seen = x = self.norm(x).flatten()
        if self.mean is None:
            return self.head(x)
        mean = self.mean if isinstance(self.mean, mx.nd.NDArray) else mx.nd.array(self.mean)
        if mx.autograd.is_training():
            moved = mean * 0.9 + x.mean(axis=0) * 0.1
            moved = moved if isinstance(self.mean, mx.nd.NDArray) else moved.asnumpy()
            if self.in_place:
                self.mean[:] = moved
            else:
                self.mean = moved
        x = x + mx.nd.random.normal(shape=x.shape) if self.chance else x
        return self.head(x - mean)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("kind", ["mxnet", "numpy"])
@pytest.mark.parametrize("norm", ["local", "sync"])
def test_statistics_that_are_no_parameters_are_refused_and_left_alone(in_place, kind, norm):
    net = Moving(in_place, kind)
    prepare.prepare_net(net, Config(batch_norm=norm), (1, 5, 5), mx.cpu())
    mean, running = net.mean, net.norm.running_mean.data().asnumpy()
    with pytest.raises(ConfigError, match=r"changes seen, mean, which .* keep it as a parameter"):
        prepare.check_state(net, IMAGE)
    assert net.mean is mean and not np.asarray(mean.asnumpy() if kind == "mxnet" else mean).any()
    assert (
        net.norm.running_mean.data().asnumpy() == running
    ).all() and not net.seen.asnumpy().any()


def test_statistics_are_found_in_a_net_whose_scores_are_saturated():
    """With a variance of 0 sigmoids are 0 and 1, and of two like images it stays 0."""

    class Scratch(Moving):
        def forward(self, x):
            x = self.head(self.norm(x))
            if not mx.autograd.is_training():
                return mx.nd.sigmoid((x - 0.1) / mx.nd.sqrt(self.mean[:3] + 1e-7))
            self.mean = self.mean * 0.9 + 0.1 * mx.nd.square(x - x.mean(axis=0)).mean()
            return x

    net = Scratch()
    prepare.prepare_net(net, Config(), (1, 5, 5), mx.cpu())
    with pytest.raises(ConfigError, match=r"changes mean, which"):
        prepare.check_state(net, IMAGE)


def rows(net, x):
    return net.head(net.norm(x).reshape((1, -1)))


def mean(net, x):
    return net.head(net.norm(x)).mean(axis=0, keepdims=True)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (rows, "the net cannot take .*, 2 at once: MXNetError: .*Shape incons"),
        (mean, "the net gives 3 scores for one image, and 3 for two"),
    ],
)
def test_nets_for_one_image_are_refused(forward, said):
    net = type("Single", (Moving,), {"forward": forward})()
    prepare.prepare_net(net, Config(), (1, 5, 5), mx.cpu())
    with pytest.raises(ConfigError, match=said):
        prepare.check_state(net, IMAGE)


@pytest.mark.parametrize(("axes", "told"), [(None, True), ((1, 2, 3), False)])
def test_scores_that_depend_on_the_rest_of_the_batch_are_told_of(axes, told, capfd):
    def centred(net, x):
        x = net.norm(x)
        return net.head(x - x.mean(axis=axes, keepdims=True))

    net = type("Centred", (Moving,), {"forward": centred})()
    prepare.prepare_net(net, Config(), (1, 5, 5), mx.cpu())
    prepare.check_state(net, IMAGE)
    assert ("depend on the other images in its batch" in capfd.readouterr().err) == told


@pytest.mark.parametrize("arguments", [{"kept": ""}, {"chance": True}])
def test_arrays_that_scores_do_not_depend_on_are_the_nets_own_affair(arguments):
    """As the attention that was seen last; of scores that are drawn nothing is known."""
    net = Moving(**arguments)
    prepare.prepare_net(net, Config(), (1, 5, 5), mx.cpu())
    prepare.check_state(net, IMAGE)


def test_a_net_without_arrays_is_not_run_in_training_mode(monkeypatch):
    net = nn.Dense(3)
    prepare.prepare_net(net, Config(), (1, 5, 5), mx.cpu())
    monkeypatch.setattr(mx.autograd, "record", None)
    prepare.check_state(net, IMAGE)


@pytest.mark.parametrize("units", [0, 25])
def test_an_unknown_initializer_is_reported_whether_or_not_shapes_are_known(units):
    message = refusal(nn.Dense(3, weight_initializer="lecun", in_units=units))
    assert "_weight cannot be drawn: lecun is not registered" in message
    assert message.endswith('give it an init of its own, e.g. params.get(..., init="ones")')


def test_sparse_gradients_are_not_accumulated():
    net = nn.HybridSequential()
    net.add(nn.Embedding(5, 2, sparse_grad=True), nn.Dense(3))
    assert "gradients are sparse" in refusal(net, optimizer=Optimizer(accumulate=2))
    prepare.prepare_net(net, Config(), (1, 5, 5), mx.cpu())


def test_mxnets_numpy_mode_is_refused_with_the_way_out():
    mx.npx.set_np()
    try:
        assert "call mxnet.npx.reset_np() before" in refusal(nn.Dense(10))
    finally:
        mx.npx.reset_np()


def test_a_net_that_cannot_be_hybridized_is_prepared_without():
    prepare.prepare_net(
        LooksAtItsShape(), Config(model=Model(hybridize=False)), (1, 5, 5), mx.cpu()
    )


def test_batch_norm_that_cannot_be_synced_may_stay_local():
    assert "or set batch_norm=local" in refusal(OfItsOwn(), batch_norm="sync")
    prepare.prepare_net(OfItsOwn(), Config(), (1, 5, 5), mx.cpu())


def test_batch_norm_that_cannot_be_calibrated_is_refused_before_training():
    assert "and set calibrate_samples=0" in refusal(OfItsOwn(), calibrate_samples=8)


def test_a_net_that_is_synced_already_is_not_taken_for_a_local_one():
    """Where a rank gets no sample of the last batch, the others would wait for it."""
    synced = batch_norm.convert_sync_batch_norm(nn.BatchNorm())
    assert "set batch_norm=sync" in refusal(synced)
    prepare.prepare_net(synced, Config(batch_norm="sync"), (1, 5, 5), mx.cpu())


def test_two_outputs_are_reported_hybridized_or_not():
    net = Pair()
    prepare.prepare_net(net, Config(), (1, 5, 5), mx.cpu())
    with pytest.raises(ConfigError, match="the net gives .* for one sample"):
        prepare.class_scores(net, (1, 5, 5), mx.cpu(), classes=10)


@pytest.mark.parametrize(
    ("last", "shown"), [(nn.Dense(7), "(1, 7)"), (nn.Conv2D(10, kernel_size=1), "(1, 10, 3, 3)")]
)
def test_scores_that_do_not_fit_the_classes_are_reported(last, shown):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(2, kernel_size=3), last)
    prepare.prepare_net(net, Config(), (1, 5, 5), mx.cpu())
    with pytest.raises(ConfigError, match="the data has 10 classes") as raised:
        prepare.class_scores(net, (1, 5, 5), mx.cpu(), classes=10)
    assert shown in str(raised.value)


def test_initial_weights_go_by_the_seed():
    def drawn(seed):
        net = nn.Dense(3)
        prepare.prepare_net(net, Config(seed=seed), (1, 2, 2), mx.cpu())
        return net.weight.data().asnumpy().tolist()

    assert drawn(1) == drawn(1) != drawn(2)

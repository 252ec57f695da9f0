"""`trainer.d2l.train_ch5` compared to the book's own, with the book's loaders."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Dict, List, Tuple

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon.data.vision import transforms

import launch
from launch.local.function import RankError
from trainer.d2l import load_data_fashion_mnist, train_ch5
from trainer.data import fashion_mnist
from trainer.errors import ConfigError

# 193 samples in batches of 64 leave one for the last batch: on two ranks one of them gets none.
SAMPLES, BATCH = 193, 64
LINE = re.compile(
    r"epoch (\d), loss (\d\.\d{4}), train acc (\d\.\d{3}), test acc (\d\.\d{3}), time \d+\.\d sec"
)


def _train(where: str, sync: bool = False, calls: int = 1, shift: bool = False) -> Dict:
    """Two epochs by ``where``'s train_ch5; the weights by their place in the net."""
    import importlib

    from mxnet.gluon import data as gdata
    from mxnet.gluon import nn

    from trainer import batch_norm, dist
    from trainer.data import fashion_mnist
    from trainer.dist import environment

    def loader(split: str, shuffle: bool) -> gdata.DataLoader:
        images, labels = fashion_mnist.load(split, dataset="fashion_mnist_sample")
        first = environment.rank() if shift else 0
        part = slice(first, first + SAMPLES)
        dataset = gdata.ArrayDataset(
            mx.nd.array(images[part, :, :, None], dtype=np.uint8), labels[part]
        )
        to_tensor = gdata.vision.transforms.ToTensor()
        return gdata.DataLoader(dataset.transform_first(to_tensor), BATCH, shuffle=shuffle)

    train_iter, test_iter = loader("train", True), loader("test", False)
    # Rank 0 has the seeds of the one process; what the others have must not matter.
    mx.random.seed(1 + environment.rank())
    np.random.seed(1 + environment.rank())
    if environment.rank() == 0:  # there the layers have other names: dense10 goes before dense9
        _ = [(nn.Dense(1), batch_norm.SyncBatchNorm()) for _ in range(9)]
    net = nn.Sequential()
    net.add(nn.Conv2D(4, kernel_size=5, strides=4), nn.BatchNorm(), nn.Activation("relu"))
    net.add(nn.Dense(10, activation="tanh"), nn.Dense(10))
    if sync:
        dist.init()
        batch_norm.convert_sync_batch_norm(net)
    net.initialize(mx.init.Xavier())
    arguments = {"learning_rate": 0.05, "momentum": 0.9, "wd": 1e-3}
    trainer = mx.gluon.Trainer(net.collect_params(), "sgd", arguments)
    train_ch5 = importlib.import_module(where).train_ch5
    for _ in range(calls):
        train_ch5(net, train_iter, test_iter, BATCH, trainer, mx.cpu(), 2 // calls)
    return {name: p.data().asnumpy() for name, p in net._collect_params_with_prefix().items()}


def _figures(said: str) -> List[Tuple[float, ...]]:
    return [tuple(map(float, figures)) for figures in LINE.findall(said)]


@pytest.fixture(scope="module")
def book() -> Tuple[Dict, List[Tuple[float, ...]]]:
    """What the book's own function makes and prints, on one process."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        weights = _train("d2lzh")
    said = printed.getvalue()
    assert said.startswith("training on cpu(0)\n") and len(_figures(said)) == 2
    return weights, _figures(said)


def test_on_one_rank_it_is_the_books(book: tuple, capfd: pytest.CaptureFixture) -> None:
    weights, figures = book
    for name, array in _train("trainer.d2l").items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    assert _figures(capfd.readouterr().out) == figures


def test_on_ranks_with_synced_norm_it_is_the_books(
    book: tuple, capfd: pytest.CaptureFixture
) -> None:
    """In two calls, so that momentum and shuffling have to go on."""
    weights, figures = book
    by_rank = launch.run(_train, ("trainer.d2l", True, 2), ranks=2)
    said = capfd.readouterr().out
    for rank_weights in by_rank:
        for name, array in rank_weights.items():
            np.testing.assert_allclose(array, weights[name], atol=2e-5, err_msg=name)
    assert "[1]" not in said and said.count("[0] training on cpu(0)\n") == 2
    found = [row[1:] for row in _figures(said)]
    np.testing.assert_allclose(found, [row[1:] for row in figures], atol=2e-4)


def test_with_plain_norm_the_ranks_end_with_one_model() -> None:
    first, second = launch.run(_train, ("trainer.d2l",), ranks=2)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def test_loaders_that_differ_are_refused() -> None:
    with pytest.raises(RankError, match="ValueError: the ranks' loaders give different images"):
        launch.run(_train, ("trainer.d2l", False, 1, True), ranks=2)


def _try(what: str) -> Dict:
    """An epoch on six samples of something that would go wrong."""
    from mxnet import autograd, gluon
    from mxnet.gluon import nn

    from trainer.d2l import train_ch5
    from trainer.dist import environment

    rank = environment.rank()

    class Net(nn.HybridSequential):
        mean, bound = mx.nd.zeros(1), None

        def hybrid_forward(self, F, x, bound=None):  # type: ignore[no-untyped-def]
            if what == "statistics":
                self.mean = self.mean + x.mean() if autograd.is_training() else self.mean
                x = x - self.mean
            if what == "function" and rank:
                x = F.square(x)
            if bound is not None:
                x = F.broadcast_maximum(x, bound)
            if what == "parted" and autograd.is_training() and rank:
                with autograd.pause():
                    self[0].bias.set_data(mx.nd.ones(3))
            x = super().hybrid_forward(F, x)
            if what == "softmax":
                x = F.softmax(x)
            if what == "cond":
                x = F.contrib.cond(x.sum() > 0, lambda: x * 2, lambda: x)
            return x

    net = Net()
    net.add(nn.Dense(3, use_bias=what != "net" or not rank, in_units=16 if what == "cond" else 0))
    net.initialize(mx.init.One() if what in ("statistics", "function") else mx.init.Zero())
    if what == "cond":
        net.hybridize()
    if what == "statistics":
        net.mean = net.mean.copy()
    if what == "augmented":  # and other things that are no reason to refuse it
        net.bound = net.params.get_constant("bound", mx.nd.array([-np.inf]))
        net.bound.initialize()
        data = mx.sym.var("data")
        norm = gluon.SymbolBlock(mx.sym.BatchNorm(data, fix_gamma=False, name="norm"), data)
        norm.collect_params().setattr("shape", (1,))
        norm.initialize()
        body, net = net, nn.HybridSequential()
        net.add(norm, body)
    chance = np.random.RandomState(rank)  # not the global one, which is alike on all ranks

    def image(i: int) -> mx.nd.NDArray:
        shift = {"images": rank, "augmented": chance.uniform(size=(4, 4))}.get(what, 0)
        return mx.nd.ones((1, 4, 4)) * i + mx.nd.array(np.full((4, 4), shift))

    class Samples(gluon.data.Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> Tuple[mx.nd.NDArray, float]:
            return image(i), float((i + rank) % 2 if what == "labels" else i % 2)

    loader = gluon.data.DataLoader(Samples(), 2, shuffle=True)
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
    train_ch5(net, loader, gluon.data.DataLoader(Samples(), 2), 2, trainer, mx.cpu(), 1)
    found = {name: p.data().asnumpy() for name, p in net.collect_params().items()}
    return {name: array for name, array in found.items() if name.startswith("norm")}


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("images", "ValueError: the ranks' loaders give different images"),
        ("labels", "ValueError: the ranks' loaders give different labels"),
        ("net", r"the ranks have different nets: 0.bias .* on rank 0.*, 0.weight .* on rank 1"),
        ("parted", r"ValueError: the ranks' weights have parted in epoch 1: 0.bias on rank 1 is"),
        ("cond", "the net is compiled and has F.contrib.cond"),
        ("statistics", "training changes mean, which the net's scores depend on"),
        ("function", "with the same weights and image that on rank 1.* gives other scores than"),
    ],
)
def test_what_would_go_wrong_is_refused_on_ranks(what: str, said: str) -> None:
    with pytest.raises(RankError, match=said):
        launch.run(_try, (what,), ranks=2)


def test_images_may_be_augmented_by_each_rank_on_its_own() -> None:
    """And a net may have a constant of -inf, and an imported graph with batch norm."""
    first, second = launch.run(_try, ("augmented",), ranks=2)
    assert first == second and first["norm_moving_mean"] > 0


def test_a_second_softmax_is_told_of(capfd: pytest.CaptureFixture) -> None:
    for ranks in (1, 2):
        launch.run(_try, ("softmax",), ranks=ranks)
        said = "".join(capfd.readouterr())
        assert said.count("the loss takes their softmax once more") == 1, said
    launch.run(_try, ("",), ranks=1)
    assert "softmax" not in "".join(capfd.readouterr())


def test_compiled_control_flow_is_refused_on_one_rank() -> None:
    with pytest.raises(ConfigError, match="the net is compiled and has F.contrib.cond"):
        _try("cond")


def test_its_loaders_give_the_books_batches() -> None:
    train_iter, test_iter = load_data_fashion_mnist(4, resize=56)
    images, labels = fashion_mnist.load("test")
    data, label = next(iter(test_iter))
    first = mx.nd.array(images[0, :, :, None], dtype=np.uint8)
    expected = transforms.ToTensor()(transforms.Resize(56)(first))
    np.testing.assert_array_equal(data[0].asnumpy(), expected.asnumpy())
    assert data.shape == (4, 1, 56, 56) and list(label.asnumpy()) == list(labels[:4])
    assert len(train_iter) == 15_000

    def drawn() -> List[int]:
        np.random.seed(3)
        return list(next(iter(train_iter))[1].asnumpy())

    assert drawn() == drawn() != list(fashion_mnist.load("train")[1][:4])


def test_several_devices_in_one_process_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cpu\(0\), cpu\(1\).; train_ch5 takes one device"):
        train_ch5(None, [], [], BATCH, None, [mx.cpu(0), mx.cpu(1)], 1)

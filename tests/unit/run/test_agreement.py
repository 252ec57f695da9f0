"""What a run is made of, by digest."""

from __future__ import annotations

import contextlib
import functools

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn

from trainer.data.input_pipeline import Sets
from trainer.data.sources.base import ArraySource
from trainer.errors import ConfigError
from trainer.run import agreement
from trainer.step.loss import cross_entropy


def hinge(scores, labels):
    return mx.nd.relu(1 - mx.nd.pick(scores, labels))


def twice(scores, labels):
    return mx.nd.relu(2 - mx.nd.pick(scores, labels))


def by_default(scores, labels, gamma=2.0):
    return hinge(scores, labels) ** gamma


def by_another_default(scores, labels, gamma=5.0):
    return hinge(scores, labels) ** gamma


by_another_default.__qualname__ = by_default.__qualname__  # as where it was edited


def around(factor):
    return lambda scores, labels: hinge(scores, labels) * factor


def recursive():
    def loss(scores, labels):
        return loss(scores, labels)

    return loss


class Weighted:
    def __init__(self, weights):
        self.weights = weights

    def __call__(self, scores, labels):
        return hinge(scores, labels) * self.weights

    def halved(self, scores, labels):
        return self(scores, labels) / 2


def softened(power):
    class Softened(gluon.loss.Loss):  # each time of the same name
        def hybrid_forward(self, F, scores, labels):
            return scores**2 if power == 2 else scores

        if power == 3:

            def hybrid_forward(self, F, scores, labels):
                return scores**3

    return Softened(None, 0)


# Each makes it anew, as another process would.
MADE = [
    lambda: by_default,
    lambda: by_another_default,
    lambda: around(1.0),
    lambda: around(2.0),
    lambda: around(mx.nd.array([1, 2])),
    lambda: around(mx.nd.array([1, 3])),
    lambda: around(np.array([1, 3])),
    lambda: around(np.float32(2.5)),
    lambda: around(np.float32(3.5)),
    lambda: around(hinge),
    lambda: around(around(2.0)),
    recursive,
    lambda: Weighted(2),
    lambda: Weighted(3),
    lambda: Weighted(mx.nd.array([3])),
    lambda: Weighted(3).halved,
    lambda: functools.partial(around(1.0), labels=gluon.loss.L2Loss()),
    lambda: functools.partial(around(1.0), labels=gluon.loss.L1Loss()),
    lambda: softened(2),
    lambda: softened(3),
]


def test_a_loss_is_told_apart_by_what_it_holds_and_is_the_same_when_made_anew():
    digests = [agreement.of_loss(make())["loss"] for make in MADE]
    assert len(set(digests)) == len(MADE)
    assert digests == [agreement.of_loss(make())["loss"] for make in MADE]


LOSSES = [
    hinge,
    twice,
    lambda scores, labels: hinge(scores, labels) * 2,
    lambda scores, labels: hinge(scores, labels) * 3,
    functools.partial(cross_entropy, smoothing=0.1),
    functools.partial(cross_entropy, smoothing=0.2),
    gluon.loss.SoftmaxCrossEntropyLoss(),
    gluon.loss.SoftmaxCrossEntropyLoss(weight=2.0),
    gluon.loss.L2Loss(),
]


def test_losses_that_compute_something_else_have_other_digests():
    digests = [agreement.of_loss(loss)["loss"] for loss in LOSSES]
    assert len(set(digests)) == len(LOSSES)
    assert agreement.of_loss(None) == {}


def test_a_loss_that_is_made_anew_is_the_same():
    """Gluon counts in the names of blocks how many were made before."""
    made = [gluon.loss.SoftmaxCrossEntropyLoss() for _ in range(2)]
    assert made[0].name != made[1].name
    assert agreement.of_loss(made[0]) == agreement.of_loss(made[1])


@pytest.mark.parametrize("name", ["train", "test"])
def test_one_pixel_more_is_another_set(name):
    sets = {"train": np.zeros((3, 2, 2), np.uint8), "test": np.zeros((2, 2, 2), np.uint8)}

    def digests():
        train, test = (ArraySource(sets[k], np.zeros(len(sets[k]), int)) for k in sets)
        return agreement.of_data(Sets(train, None, test))

    before = digests()
    assert digests() == before
    sets[name] = sets[name].copy()
    sets[name][-1, -1, -1] = 1
    assert [key for key, value in digests().items() if value != before[key]] == [
        f"{'training' if name == 'train' else name} images"
    ]


@pytest.mark.parametrize("name", ["train", "test"])
def test_one_other_label_is_another_set(name):
    labels = {"train": np.zeros(3, int), "test": np.zeros(2, int)}

    def digests():
        train, test = (ArraySource(np.zeros((len(y), 2, 2), np.uint8), y) for y in labels.values())
        return agreement.of_data(Sets(train, None, test))

    before = digests()
    labels[name] = np.append(labels[name][:-1], 1)
    changed = [key for key, value in digests().items() if value != before[key]]
    assert changed == [f"{'training' if name == 'train' else name} labels"]


def net(units=3, more=0):
    for _ in range(more):
        nn.Dense(1)
    made = nn.HybridSequential()
    made.add(nn.Dense(units, in_units=2), nn.BatchNorm(in_channels=units))
    return made


def test_a_net_is_its_parameters_by_structural_name():
    assert agreement.of_net(net()) == agreement.of_net(net(more=9)) != agreement.of_net(net(4))
    frozen = net()
    frozen[0].bias.grad_req = "null"
    assert agreement.of_net(frozen) != agreement.of_net(net())


def test_layers_that_share_their_parameters_are_another_net():
    def made(tied):
        net = nn.HybridSequential()
        net.add(nn.Dense(2, in_units=2))
        net.add(nn.Dense(2, in_units=2, params=net[0].params if tied else None))
        return agreement.of_net(net)

    assert made(True) == made(True) != made(False)


def test_a_file_of_initial_weights_counts_by_its_content(tmp_path):
    made, file = net(), tmp_path / "w.params"
    made.initialize(mx.init.One())
    found = []
    for value in (1, 2):
        made[0].bias.set_data(mx.nd.full(3, value))
        made.save_parameters(str(file))
        found.append(agreement.of_initial_weights(net(), str(file)))
    assert found[0] != found[1] and list(found[0]) == ["initial weights"]
    assert agreement.of_initial_weights(net(), str(file)) == found[1]
    file.unlink()
    assert agreement.of_initial_weights(made, str(file)) == {}


def test_weights_count_once_they_are_all_there():
    made = net()
    assert agreement.of_initial_weights(made) == {}
    made.initialize(mx.init.One())
    before = agreement.of_initial_weights(made)
    assert list(before) == ["initial weights"]
    made[1].running_mean.set_data(mx.nd.ones(3))
    assert agreement.of_initial_weights(made) == before, "running statistics are not weights"
    made[0].bias.set_data(mx.nd.array([0, 0, 1e-30]))
    assert agreement.of_initial_weights(made) != before


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([("cpu", "a", ""), ("cpu", "a", "")], None),
        ([("gpu", "a", "1"), ("gpu", "a", "2"), ("gpu", "b", "1")], None),
        ([("gpu", "a", ""), ("gpu", "a", "")], None),  # unknown
        ([("gpu", "a", "1"), ("gpu", "a", "2"), ("gpu", "a", "1")], "rank 0 and rank 2 .*same GPU"),
        ([("gpu", "a", "1"), ("cpu", "a", "")], "rank 0 is on the gpu and rank 1 on the cpu"),
    ],
)
def test_ranks_of_a_node_have_each_a_gpu_of_its_own(monkeypatch, ranks, said):
    told = [(*where, f"rank {rank}") for rank, where in enumerate(ranks)]
    monkeypatch.setattr(agreement.dist, "gather_objects", lambda own: told)
    with pytest.raises(ConfigError, match=said) if said else contextlib.nullcontext():
        agreement.check_devices(mx.cpu())

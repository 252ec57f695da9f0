"""What a run is made of, by digest."""

from __future__ import annotations

import argparse
import contextlib
import enum
import functools
import logging
import types
from typing import NamedTuple

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn

from trainer.config import Config
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


SCALE, ARRAY = 2.0, mx.nd.array([1, 4])
LOG = logging.getLogger()
ARGUMENTS = argparse.Namespace(scale=2.0, epochs=3, log=LOG)
WITHIN = Weighted(2)


def by_globals(scores, labels):
    """What this says is no part of it."""
    return sum(hinge(scores, labels) * SCALE * each for each in ARRAY)


def by_arguments(scores, labels):
    ARGUMENTS.log.debug(scores)
    return hinge(scores, labels) * ARGUMENTS.scale


def through_others(scores, labels):
    return by_arguments(scores, labels) + WITHIN(scores, labels)


class Composed(gluon.loss.Loss):
    """Of another loss, a function and a constant, or of what was added to it."""

    def __init__(self, weight=None, function=None, constant=None, added=None):
        super().__init__(None, 0)
        if weight is not None:
            self.inner = gluon.loss.SoftmaxCrossEntropyLoss(weight=weight)
        self.function = function
        if constant is not None:
            self.constant = self.params.get_constant("constant", mx.nd.array([constant]))
            self.constant.initialize()
        if added is not None:
            self.register_child(gluon.loss.L2Loss(weight=added))

    def hybrid_forward(self, F, scores, labels, **arrays):
        return self.helped(scores)

    def helped(self, scores):
        return scores


class Helper:
    """Is no loss, but computes one."""

    def __init__(self, scale, unread=0):
        self.scale, self.unread = scale, unread

    @property
    def doubled(self):
        return 2 * self.scale

    def computed(self, scores):
        return scores * self.doubled


HELPER = Helper(2.0)


def by_helper(scores, labels):
    return HELPER.computed(scores)


class Configured:
    def __init__(self, **settings):
        self.settings = argparse.Namespace(**settings)

    def __call__(self, scores, labels):
        return scores * self.settings.scale


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, scores, labels):
        return scores * self.scale


def with_static(function):
    class Static:  # each time of the same name
        helper = staticmethod(function)

        def __call__(self, scores, labels):
            return self.helper(scores, labels)

    return Static()


class Numbered(NamedTuple):
    scale: float

    def __call__(self, scores, labels):
        return scores * self.scale


class Halved(Numbered):
    def __call__(self, scores, labels):
        return scores / self.scale


class Settings:
    """Is a name for its attributes."""

    scale, epochs = 2.0, 3


class Inherited(Settings):
    def __call__(self, scores, labels):
        return scores * self.scale


INHERITED = Inherited()


def by_settings(scores, labels):
    return scores * Settings.scale


class Mode(enum.Enum):
    SUM, MEAN = "sum", "mean"


# Each makes it anew, as another process would.
MADE = [
    lambda: Configured(scale=2),
    lambda: Configured(scale=3),
    lambda: Slotted(2),
    lambda: Slotted(3),
    lambda: with_static(hinge),
    lambda: with_static(twice),
    lambda: Numbered(2),
    lambda: Numbered(3),
    lambda: Halved(2),
    lambda: around(Mode.SUM),
    lambda: around(Mode.MEAN),
    lambda: Composed(weight=1.0),
    lambda: Composed(weight=9.0),
    lambda: Composed(function=mx.nd.exp),
    lambda: Composed(function=mx.nd.square),
    lambda: Composed(function=np.exp),
    lambda: Composed(function=np.square),
    lambda: Composed(constant=1),
    lambda: Composed(constant=2),
    lambda: Composed(added=1.0),
    lambda: Composed(added=2.0),
    lambda: around({"a", "bc", "def"}),
    lambda: around({"a", "bc", "deg"}),
    lambda: by_globals,
    lambda: by_arguments,
    lambda: through_others,
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


@pytest.mark.parametrize(
    ("loss", "name", "value", "other"),
    [
        (by_globals, "SCALE", 5.0, True),
        (by_globals, "ARRAY", mx.nd.array([1, 400]), True),
        (by_globals, "hinge", twice, True),
        (by_globals, "ARGUMENTS", None, False),
        (by_arguments, "ARGUMENTS", argparse.Namespace(scale=3.0, log=LOG), True),
        (by_arguments, "ARGUMENTS", argparse.Namespace(scale=2.0, log=LOG, epochs=9), False),
        (through_others, "ARGUMENTS", argparse.Namespace(scale=3.0, log=None), True),
        (through_others, "WITHIN", Weighted(5), True),
        (through_others, "WITHIN", Weighted(2), False),
        (by_helper, "HELPER", Helper(3.0), True),
        (by_helper, "HELPER", Helper(2.0, unread=1), False),
    ],
)
def test_a_loss_is_known_by_the_global_variables_that_it_reads(
    monkeypatch, loss, name, value, other
):
    def digest():
        return agreement.of_loss(loss)

    before = digest()
    assert digest() == before
    monkeypatch.setitem(globals(), name, value)
    assert (digest() != before) == other


@pytest.mark.parametrize("loss", [by_settings, INHERITED])
@pytest.mark.parametrize(("name", "other"), [("scale", True), ("epochs", False)])
def test_what_stands_in_a_class_counts_where_it_is_read(monkeypatch, loss, name, other):
    before = agreement.of_loss(loss)
    monkeypatch.setattr(Settings, name, 9.0)
    assert (agreement.of_loss(loss) != before) == other


def test_what_a_loss_holds_and_does_not_read_is_no_part_of_it():
    """As a rank's number among the arguments of a script."""
    one, other = (agreement.of_loss(Configured(scale=2, rank=rank)) for rank in (0, 1))
    assert one == other


def test_an_operator_is_known_by_its_name_and_not_by_its_address_in_this_process():
    """Which the functions that MXNet generates have among their constants."""
    exp = mx.nd.exp
    # Small numbers are none: Debian's Python has its memory from some millions on.
    elsewhere = [8 + c if type(c) is int and c > 2**20 else c for c in exp.__code__.co_consts]
    assert tuple(elsewhere) != exp.__code__.co_consts
    code = exp.__code__.replace(co_consts=tuple(elsewhere))
    other = types.FunctionType(code, exp.__globals__, exp.__name__, exp.__defaults__)
    assert agreement.of_loss(Composed(function=exp)) == agreement.of_loss(Composed(function=other))


def test_a_loss_may_use_the_net_that_is_trained():
    trained, teacher = net(), net()
    for each in (trained, teacher):
        each.initialize(mx.init.One())

    def loss(scores, labels):
        return scores + trained[0].weight.data().sum() - teacher(scores)

    before = agreement.of_loss(loss, trained)
    trained[0].weight.set_data(mx.nd.zeros((3, 2)))
    assert agreement.of_loss(loss, trained) == before
    teacher[0].weight.set_data(mx.nd.zeros((3, 2)))
    assert agreement.of_loss(loss, trained) != before


def test_a_hybridized_loss_stays_the_same_when_it_has_run():
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    loss.hybridize()
    before = agreement.of_loss(loss)
    loss(mx.nd.ones((2, 3)), mx.nd.ones(2))
    assert agreement.of_loss(loss) == before


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
    lambda scores, labels: sum(2 * x for x in scores),
    lambda scores, labels: sum(3 * x for x in scores),
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


def test_weights_count_as_far_as_they_are_there():
    made = net()
    assert agreement.of_initial_weights(made) == {}
    found = []
    for value in (1, 2):  # a body that was trained before, under a new head
        made = net()
        made[0].initialize(mx.init.Constant(value))
        found.append(agreement.of_initial_weights(made))
    assert found[0] != found[1] and list(found[0]) == ["initial weights"]
    made.initialize(mx.init.One())
    before = agreement.of_initial_weights(made)
    assert before not in found
    made[1].running_mean.set_data(mx.nd.ones(3))
    assert agreement.of_initial_weights(made) == before, "running statistics are not weights"
    made[0].bias.set_data(mx.nd.array([0, 0, 1e-30]))
    assert agreement.of_initial_weights(made) != before


def test_dropout_and_multipliers_make_another_net():
    def digests(rate=0.1, **multipliers):
        [nn.Dropout(0.3) for _ in range(3)]
        made = net()
        whole = nn.Sequential()
        whole.add(made, nn.Dropout(rate), nn.Lambda(functools.partial(mx.nd.relu)))
        for name, value in multipliers.items():
            made[0].collect_params().setattr(name, value)
        return agreement.of_net(whole)

    found = [digests(), digests(0.9), digests(lr_mult=10), digests(wd_mult=0)]
    assert len({own["layers or multipliers"] for own in found}) == len(found)
    assert len({own["net"] for own in found}) == 1, "earlier versions recorded this alone"
    assert digests() == found[0]


@pytest.mark.parametrize(
    ("other", "refused"),
    [([1, -2], False), ([1.01, -2], False), ([], False), ([1, 2], True), ([1, -2, 0], True)],
)
def test_nets_that_compute_something_else_are_refused(monkeypatch, other, refused):
    told = [([1, -2], "rank 0"), (other, "rank 1")]
    monkeypatch.setattr(agreement.dist, "gather_objects", lambda own: told)
    message = "different functions: .* that on rank 1 gives other scores than that on rank 0; give"
    with pytest.raises(ConfigError, match=message) if refused else contextlib.nullcontext():
        agreement.check_answers([1, -2])


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


def test_a_rank_with_other_sources_of_the_trainer_is_refused(monkeypatch, tmp_path):
    """One node's clone is older: its augmentation, say, draws otherwise, and nothing else tells."""
    told = []
    monkeypatch.setattr(agreement, "_SOURCES", tmp_path)
    monkeypatch.setattr(agreement.dist, "gather_objects", lambda own: told.append(own) or told)
    for rank, source in enumerate(("new = 1", "new = 1", "new = 2")):
        (tmp_path / "module.py").write_text(source)
        monkeypatch.setattr(agreement.environment, "where", lambda: f"rank {rank}")  # noqa: B023
        message = r"the trainer's code is .* \(\w{8}\) on rank 0, .* \(\w{8}\) on rank 2; give each"
        refused = pytest.raises(ConfigError, match=message)
        with refused if rank == 2 else contextlib.nullcontext():
            agreement.check(Config())

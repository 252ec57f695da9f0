"""The table of layers: the seed's shapes, and totals confirmed by an independent count."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mxnet import autograd
from mxnet.gluon import Block, nn

from trainer.cli.main import main
from trainer.errors import ConfigError
from trainer.model import resnet18
from trainer.model.summary import as_markdown, as_text, summarize

# What the seed's notebook prints for a 1 x 1 x 224 x 224 input.
SEED = [
    ("Conv2D", (1, 64, 112, 112)),
    ("BatchNorm", (1, 64, 112, 112)),
    ("Activation", (1, 64, 112, 112)),
    ("MaxPool2D", (1, 64, 56, 56)),
    ("HybridSequential", (1, 64, 56, 56)),
    ("HybridSequential", (1, 128, 28, 28)),
    ("HybridSequential", (1, 256, 14, 14)),
    ("HybridSequential", (1, 512, 7, 7)),
    ("GlobalAvgPool2D", (1, 512, 1, 1)),
    ("Dense", (1, 10)),
]


def count_in_graph(net: nn.HybridBlock, shape: tuple) -> int:
    """2 x multiply-accumulates of convolutions and dense layers, from the symbolic graph."""
    symbol = net(mx.sym.var("data"))
    internals = symbol.get_internals()
    _, shapes, _ = internals.infer_shape(data=shape)
    sizes = dict(zip(internals.list_outputs(), shapes))
    total = 0
    for name, output in sizes.items():
        weight = sizes.get(name.replace("_fwd_output", "_weight"))
        if name.endswith("_fwd_output") and weight is not None:
            total += 2 * int(np.prod(output)) * int(np.prod(weight[1:]))
    return total


def trainable(net: Block) -> int:
    return sum(p.data().size for p in net.collect_params().values() if p.grad_req != "null")


@pytest.fixture(scope="module")
def seed_net():
    net = resnet18()
    net.initialize()
    return net, summarize(net, mx.nd.zeros((1, 1, 224, 224)))


def test_seeds_table_at_224(seed_net):
    _, rows = seed_net
    assert [(row.kind, row.output) for row in rows] == SEED


def test_parameters_are_all_that_are_trained(seed_net):
    net, rows = seed_net
    assert sum(row.parameters for row in rows) == trainable(net)


def test_flops_are_those_of_the_graph(seed_net):
    net, rows = seed_net
    assert sum(row.flops for row in rows) == count_in_graph(net, (1, 1, 224, 224))
    # The stem and the last layer, by hand.
    assert rows[0].flops == 2 * 7 * 7 * 64 * 112 * 112
    assert rows[-1].flops == 2 * 512 * 10
    # A stage without strides: four 3x3 convolutions of 64 channels at 56 x 56.
    assert rows[4].flops == 4 * 2 * 64 * 9 * 64 * 56 * 56
    assert rows[4].parameters == 4 * (64 * 64 * 9 + 64 + 2 * 64)


@pytest.mark.parametrize("stem, side", [("seed", 28), ("small", 28), ("seed", 96)])
def test_totals_of_other_stems_and_sizes(stem, side):
    net = resnet18(stem=stem)
    net.initialize()
    rows = summarize(net, mx.nd.zeros((2, 1, side, side)))
    assert sum(row.parameters for row in rows) == trainable(net)
    assert sum(row.flops for row in rows) == count_in_graph(net, (2, 1, side, side))
    assert rows[-1].output == (2, 10)


def test_groups_and_strides_of_convolutions():
    net = nn.HybridSequential()
    net.add(nn.Conv2D(8, 3, groups=4, strides=2), nn.Flatten(), nn.Dense(3, use_bias=False))
    net.initialize()
    rows = summarize(net, mx.nd.zeros((5, 4, 9, 9)))
    assert [row.parameters for row in rows] == [8 * 1 * 9 + 8, 0, 3 * 8 * 4 * 4]
    assert [row.flops for row in rows] == [2 * 9 * 5 * 8 * 4 * 4, 0, 2 * 8 * 4 * 4 * 5 * 3]


class Own(nn.HybridBlock):
    """Has a parameter of its own beside its layers, and uses one layer twice."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.scale = self.params.get("scale", shape=(1,), init="ones")
            self.dense = nn.Dense(4, flatten=False)

    def hybrid_forward(self, F, x, scale):
        return F.broadcast_mul(self.dense(self.dense(x)), scale)


class Imperative(Block):
    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Dense(2), nn.Dense(3)  # called the other way round

    def forward(self, x):
        return self.second(self.first(x))


def test_shared_and_own_parameters_count_once():
    net = Own()
    net.initialize()
    rows = summarize(net, mx.nd.zeros((2, 4)))
    assert sum(row.parameters for row in rows) == trainable(net) == 4 * 4 + 4 + 1
    assert sum(row.flops for row in rows) == 2 * (2 * 4 * 4 * 2)


def test_children_are_listed_in_call_order():
    net = Imperative()
    net.initialize()
    rows = summarize(net, mx.nd.zeros((2, 4)))
    assert [row.output for row in rows] == [(2, 3), (2, 2)]


def test_block_without_children_is_its_own_row():
    net = nn.Dense(3)
    net.initialize()
    (row,) = summarize(net, mx.nd.zeros((2, 4)))
    assert row[1:] == ("Dense", (2, 3), 15, 2 * 2 * 4 * 3)


def test_summary_moves_nothing_and_leaves_no_hooks():
    net = resnet18(stem="small")
    net.initialize()
    data = mx.nd.random.uniform(shape=(2, 1, 8, 8))
    net(data).wait_to_read()
    before = [p.data().asnumpy() for p in net.collect_params().values()]
    summarize(net, data)
    after = [p.data().asnumpy() for p in net.collect_params().values()]
    assert all((a == b).all() for a, b in zip(before, after))

    def hooks(block):
        yield from block._forward_hooks
        for child in block._children.values():
            yield from hooks(child)

    assert not list(hooks(net))
    with autograd.record():
        net(data)
    net.hybridize()
    net(data)


def test_hooks_are_taken_off_when_the_forward_fails():
    net = Imperative()
    net.initialize()
    net(mx.nd.zeros((2, 4)))
    with pytest.raises(mx.MXNetError):
        summarize(net, mx.nd.zeros((2, 9)))
        mx.nd.waitall()
    assert not net.first._forward_hooks


def test_text_is_aligned_and_has_totals(seed_net):
    net, rows = seed_net
    lines = as_text(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert len({len(line) for line in lines}) == 1
    assert "(1, 64, 112, 112)" in lines[1]
    assert lines[-1].startswith("total") and f"{trainable(net):,}" in lines[-1]
    assert f"{sum(row.flops for row in rows) / 1e6:,.1f}" in lines[-1]


def test_markdown_has_a_row_for_each_layer(seed_net):
    _, rows = seed_net
    lines = as_markdown(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert {line.count("|") for line in lines} == {6}
    assert "(1, 512, 7, 7)" in lines[9]


def summary_command(*words):
    return CliRunner().invoke(main, ["summary", *words])


def test_the_command_shows_nets_of_colour_images():
    done = summary_command("--channels", "3", "data.image_size=32")
    assert "(1, 64, 16, 16)" in done.output and f"{64 * (3 * 7 * 7 + 1):,}" in done.output


def test_the_command_names_what_the_net_cannot_take():
    done = summary_command("model.factory=mxnet.gluon.model_zoo.vision:squeezenet1_1")
    assert isinstance(done.exception, ConfigError)
    assert "(1, 28, 28), 1 at once: MXNetError" in str(done.exception)

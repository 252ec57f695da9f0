"""Measures forward and backward time and gradient size of each layer of a net.

    OMP_NUM_THREADS=1 python -m benchmarks.layer_times [--rounds 7] [--images 4]

The input of ``scaling_model.py``: the seed's ResNet-18 at 28 x 28 and ResNet-50 at 224 x 224. A net
is treated as a chain: sequential blocks are flattened, all other blocks are layers. Each layer runs
alone, hybridized and synchronised; times are medians over rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any, Dict, List, Tuple

import mxnet as mx
from mxnet import autograd, gluon
from mxnet.gluon import nn
from mxnet.gluon.model_zoo import vision

from benchmarks import report
from benchmarks.scaling_model import Layer
from trainer.model import resnet18


def chain(net: gluon.Block) -> List[gluon.Block]:
    """The layers of ``net`` in call order, with sequential blocks flattened."""
    if isinstance(net, (nn.Sequential, nn.HybridSequential)):
        return [layer for child in net._children.values() for layer in chain(child)]
    if isinstance(net, vision.ResNetV1):
        return [*chain(net.features), net.output]
    return [net]


def measure(layers: List[gluon.Block], data: mx.nd.NDArray, rounds: int) -> List[Layer]:
    """Each layer's times in a forward of ``data``; the first layer needs no input gradient."""
    found = []
    for number, layer in enumerate(layers):
        if number:
            data.attach_grad()
        forward, backward = [], []
        for _ in range(rounds + 1):  # the first compiles
            mx.nd.waitall()
            began = time.perf_counter()
            with autograd.record():
                output = layer(data)
            output.wait_to_read()
            middle = time.perf_counter()
            output.backward()
            mx.nd.waitall()
            forward.append(middle - began)
            backward.append(time.perf_counter() - middle)
        parameters = [p for p in layer.collect_params().values() if p.grad_req != "null"]
        size = sum(4 * p.data().size for p in parameters)
        medians = (statistics.median(times[1:]) for times in (forward, backward))
        found.append(Layer(layer.name, *medians, size, norm_channels(layer)))
        data = output.detach()
    return found


def norm_channels(layer: gluon.Block) -> Tuple[int, ...]:
    """The number of channels of each batch norm within ``layer``."""
    found: List[int] = []

    def collect(block: gluon.Block) -> None:
        if isinstance(block, nn.BatchNorm):
            found.append(block.gamma.shape[0])

    layer.apply(collect)
    return tuple(found)


def prepared(net: gluon.HybridBlock, data: mx.nd.NDArray) -> List[gluon.Block]:
    """The layers of ``net``, initialised and hybridized."""
    net.initialize(mx.init.Xavier())
    net(data)
    net.hybridize(static_alloc=True)
    return chain(net)


def main() -> None:
    """Measure, print, write results/layer_times.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=4, help="of 224 x 224, in a batch")
    args = parser.parse_args()
    before = report.machine()
    nets = {
        "resnet18_28": (resnet18(), (64, 1, 28, 28)),
        "resnet50_224": (vision.resnet50_v1(), (args.images, 3, 224, 224)),
    }
    figures: Dict[str, Any] = {}
    for name, (net, shape) in nets.items():
        data = mx.nd.random.normal(shape=shape)
        layers = measure(prepared(net, data), data, args.rounds)
        figures[name] = {"shape": shape, "layers": [dataclasses.asdict(layer) for layer in layers]}
        rows = [
            (
                layer.name,
                f"{1000 * layer.forward:.1f}",
                f"{1000 * layer.backward:.1f}",
                f"{layer.gradient_bytes / 1e6:.2f}",
            )
            for layer in layers
        ]
        print(f"{name}, {shape}")
        print(report.table(("layer", "forward, ms", "backward, ms", "gradient, MB"), rows))
    print(report.write("layer_times", figures, before))


if __name__ == "__main__":
    main()

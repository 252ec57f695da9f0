"""Predicts efficiency on 8 to 4,096 GPUs: the table and the plot of ``docs/scaling.md``.

    python -m benchmarks.scaling

ResNet-50 as Horovod's published figures have it, on nodes of 8 V100. No GPU was at hand: how a
step divides among layers was measured on the CPU (``results/layer_times.json``), and its length is
set so that the model gives the published speed on 8 GPUs. The published speed on 256 is the test.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Dict, List, NamedTuple, Sequence

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from benchmarks import report
from benchmarks.scaling_model import Cluster, Horovod, Layer, Link, compute, scaled, step
from trainer.config.schema import BUCKET_MB

PUBLISHED = {8: 3078.0, 256: 89858.0}  # images per second of ResNet-50, Horovod with MXNet
BATCH = 128  # images per GPU
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SHOWN = (8, 32, 256, 1024, 4096)
PICTURE = report.RESULTS.parents[1] / "docs" / "scaling.png"

# Assumed, not measured: latency of TCP and of NVLink, bandwidth of NCCL's rings in a node of 8
# V100, and as much time for agreeing as half a cycle of Horovod's, which comes before it.
WITHIN = Link(latency=5e-6, bandwidth=120e9)
LATENCY = 30e-6
REQUEST = 0.5e-3
BUCKETS = Horovod(bucket_bytes=BUCKET_MB * 2**20, request=REQUEST, norm_request=2 * REQUEST)


def network(gbit: float) -> Link:
    """The network link of a node."""
    return Link(LATENCY, gbit * 1e9 / 8)


class Scenario(NamedTuple):
    """A row of the table."""

    title: str
    gbit: float = 25
    hierarchical: bool = True
    horovod: Horovod = BUCKETS
    sync_batch_norm: bool = False

    def speed(self, layers: Sequence[Layer], gpus: int) -> float:
        """Images a second over all GPUs."""
        cluster = Cluster(gpus, network(self.gbit), 8, WITHIN, self.hierarchical, trees=True)
        return gpus * BATCH / step(layers, cluster, self.horovod, self.sync_batch_norm).step


SCENARIOS = [
    Scenario("flat ring, 25 Gbit/s", hierarchical=False),
    Scenario("hierarchical, 25 Gbit/s"),
    Scenario("hierarchical, 25 Gbit/s, fp16", horovod=replace(BUCKETS, fp16=True)),
    Scenario(
        "hierarchical, 25 Gbit/s, one bucket", horovod=replace(BUCKETS, bucket_bytes=math.inf)
    ),
    Scenario("hierarchical, 25 Gbit/s, sync batch norm", sync_batch_norm=True),
    Scenario("hierarchical, 10 Gbit/s", gbit=10),
    Scenario("hierarchical, 100 Gbit/s", gbit=100),
]


def calibrated(layers: Sequence[Layer], images_per_second: float) -> List[Layer]:
    """``layers`` scaled to a device of which 8 in a node reach ``images_per_second``."""
    low, high = 0.0, 8 * BATCH / images_per_second / compute(layers)
    for _ in range(50):
        middle = (low + high) / 2
        if SCENARIOS[0].speed(scaled(layers, middle), 8) > images_per_second:
            low = middle
        else:
            high = middle
    return scaled(layers, high)


def plot(efficiencies: Dict[str, List[float]], published: float) -> None:
    """Write docs/scaling.png."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=80)
    for title, values in efficiencies.items():
        axes.plot(GPUS, [100 * value for value in values], marker=".", label=title)
    axes.plot([256], [100 * published], "k*", markersize=11, label="published, 256 GPUs")
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
    axes.set(xlabel="GPUs", ylabel="efficiency, %", ylim=(0, 102))
    axes.set_title("ResNet-50 on nodes of 8 V100, 128 images per GPU: the model", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(PICTURE)


def main() -> None:
    """Print the table, write results/scaling.json and the plot."""
    before = report.machine()
    measured = json.loads((report.RESULTS / "layer_times.json").read_text())["figures"]
    layers = calibrated(
        [Layer(**layer) for layer in measured["resnet50_224"]["layers"]], PUBLISHED[8]
    )
    alone = BATCH / compute(layers)
    efficiencies = {
        scenario.title: [scenario.speed(layers, gpus) / gpus / alone for gpus in GPUS]
        for scenario in SCENARIOS
    }
    rows = [
        (title, *(f"{100 * dict(zip(GPUS, values))[gpus]:.1f} %" for gpus in SHOWN))
        for title, values in efficiencies.items()
    ]
    print(report.table(("GPUs", *map(str, SHOWN)), rows))
    on_256 = {s.title: s.speed(layers, 256) for s in SCENARIOS[:2]}
    published = PUBLISHED[256]
    for title, speed in on_256.items():
        error = 100 * (speed / published - 1)
        print(
            f"256 GPUs, {title}: {speed:,.0f} images/s, published {published:,.0f}: {error:+.1f} %"
        )
    plot(efficiencies, published / 256 / alone)
    figures = {
        "alone": alone,
        "gpus": GPUS,
        "efficiency": efficiencies,
        "images_per_second_on_256": on_256,
        "published": PUBLISHED,
    }
    print(report.write("scaling", figures, before))


if __name__ == "__main__":
    main()

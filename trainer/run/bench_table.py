"""Results of a benchmark as tables for the terminal and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Tuple

from ..config import Config, to_dict
from ..console import aligned
from ..report.wording import of_ranks
from .bench import Figures

MEANINGS = {  # of phases whose name does not say all
    "data": "wait for the batch",
    "backward": "loss and backward",
    "ranks": "wait for the slowest rank",
    "allreduce": "allreduce of gradients",
}
_MUCH = 0.1  # of a step's time
Rows = List[Tuple[str, ...]]  # the first is the head


def as_dict(config: Config, figures: Figures) -> Dict[str, Any]:
    """The figures together with every setting of the run, as JSON-serializable values."""
    more = {"headroom": figures.headroom, "hidden": figures.hidden}
    return {"config": to_dict(config), "figures": {**dataclasses.asdict(figures), **more}}


def as_text(config: Config, figures: Figures) -> str:
    """The results of one benchmark, for the standard output."""
    head = (
        f"{of_ranks(figures.ranks)}, rank 0 on {figures.device}, global batch "
        f"{config.train.global_batch_size}, batch norm {config.batch_norm}; {figures.steps} steps"
    )
    parts = (_speeds, _phases, *([_link] if figures.ranks > 1 else []), _memory)
    return "\n".join([head, *(aligned(part(figures)) for part in parts), *_advice(config, figures)])


def _speeds(figures: Figures) -> Rows:
    slow, middle, fast = (f"{speed:,.1f}" for speed in figures.training_percentiles.values())
    steps = f"of steps: {slow} (10 %), {middle}, {fast} (90 %)"
    return [
        ("", "images/s", ""),
        ("training", f"{figures.training:,.1f}", steps),
        ("synchronised", f"{figures.synchronised:,.1f}", "training, every phase waited for"),
        ("loader alone", f"{figures.loader:,.0f}", f"{figures.headroom:,.1f} times training"),
        ("evaluation", f"{figures.evaluation:,.1f}", ""),
    ]


def _phases(figures: Figures) -> Rows:
    total = sum(figures.phases.values())
    return [
        ("a synchronised step", "ms", ""),
        *(
            (MEANINGS.get(phase, phase), f"{1000 * seconds:.2f}", f"{100 * seconds / total:.1f} %")
            for phase, seconds in figures.phases.items()
        ),
        ("all", f"{1000 * total:.2f}", ""),
    ]


def _link(figures: Figures) -> Rows:
    """What is between the ranks, and how much of it a step waits for."""
    allreduce = figures.phases["allreduce"]
    megabytes = figures.gradient_bytes / 1e6
    return [
        ("between ranks", "ms", ""),
        ("a small sum", f"{1000 * figures.small_sum:.2f}", "synced batch norm has two per layer"),
        (
            "gradients, alone",
            f"{1000 * allreduce:.2f}",
            f"{megabytes:.1f} MB, {megabytes / allreduce:,.0f} MB/s" if allreduce else "",
        ),
        (
            "gradients, in training",
            f"{1000 * allreduce * (1 - figures.hidden):.2f}",
            f"{100 * figures.hidden:.0f} % are hidden behind computing",
        ),
    ]


def _advice(config: Config, figures: Figures) -> List[str]:
    """What to change where a step waits for gradients."""
    waits = figures.phases["allreduce"] * (1 - figures.hidden) / figures.step
    if figures.ranks == 1 or waits < _MUCH:
        return []
    ways = ["a larger train.global_batch_size sends them less often per image"]
    if not config.optimizer.fp16_allreduce:
        ways.append("optimizer.fp16_allreduce=true sends half as many bytes")
    return [f"{100 * waits:.0f} % of a step waits for gradients: {'; '.join(ways)}"]


def _memory(figures: Figures) -> Rows:
    peaks = ((str(rank), f"{peak:,.0f}") for rank, peak in enumerate(figures.peak_mib))
    return [("rank", "peak memory, MiB"), *peaks]

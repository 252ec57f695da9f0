"""Results of a benchmark as tables for the terminal and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Sequence, Tuple, Union

from rich.console import Console
from rich.table import Table

from ..config import Config, to_dict
from .bench import Figures

MEANINGS = {
    "data": "wait for the batch",
    "forward": "forward",
    "backward": "loss and backward",
    "ranks": "wait for the slowest rank",
    "allreduce": "allreduce of gradients",
    "update": "update",
    "other": "other",
}
WIDTH = 100  # where the output is no terminal

Columns = Sequence[str]
Rows = List[Tuple[str, ...]]


def as_dict(config: Config, figures: Figures) -> Dict[str, Any]:
    """The figures together with every setting of the run, as JSON-serializable values."""
    values = {**dataclasses.asdict(figures), "headroom": figures.headroom}
    return {"config": to_dict(config), "figures": values}


def as_text(config: Config, figures: Figures) -> str:
    """The results of one benchmark, for the standard output."""
    head = (
        f"{figures.ranks} {'rank' if figures.ranks == 1 else 'ranks'}, rank 0 on "
        f"{figures.device}, global batch {config.train.global_batch_size}, batch norm "
        f"{config.batch_norm}; {figures.steps} steps"
    )
    return _drawn(head, *(_table(*part(figures)) for part in (speeds, phases, memory)))


def speeds(figures: Figures) -> Tuple[Columns, Rows]:
    """Images a second over all ranks, as a table."""
    slow, middle, fast = (f"{speed:,.1f}" for speed in figures.training_percentiles.values())
    steps = f"of steps: {slow} (10 %), {middle}, {fast} (90 %)"
    return ("", "images/s", ""), [
        ("training", f"{figures.training:,.1f}", steps),
        ("synchronised", f"{figures.synchronised:,.1f}", "training, every phase waited for"),
        ("loader alone", f"{figures.loader:,.0f}", f"{figures.headroom:,.1f} times training"),
        ("evaluation", f"{figures.evaluation:,.1f}", ""),
    ]


def phases(figures: Figures) -> Tuple[Columns, Rows]:
    """The phases of a synchronised step, as a table."""
    total = sum(figures.phases.values())
    rows: Rows = [
        (MEANINGS[phase], f"{1000 * seconds:.2f}", f"{100 * seconds / total:.1f} %")
        for phase, seconds in figures.phases.items()
    ]
    return ("a synchronised step", "ms", ""), [*rows, ("all", f"{1000 * total:.2f}", "")]


def memory(figures: Figures) -> Tuple[Columns, Rows]:
    """The peak memory of each rank, as a table."""
    rows: Rows = [(str(rank), f"{peak:,.0f}") for rank, peak in enumerate(figures.peak_mib)]
    return ("rank", "peak memory, MiB"), rows


def _drawn(*parts: Union[str, Table]) -> str:
    """At the standard output's width; at a fixed one where it is no terminal."""
    console = Console(color_system=None)
    console = console if console.is_terminal else Console(width=WIDTH)
    with console.capture() as drawn:
        for part in parts:
            console.print(part, highlight=False)
    return drawn.get().rstrip("\n")


def _table(columns: Columns, rows: Rows) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    numbers = [any(row[i][:1].isdigit() for row in rows) for i in range(len(columns))]
    for column, number in zip(columns, numbers):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table

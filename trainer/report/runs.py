"""Lists and compares past runs, from the files in their folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple

from .. import console
from ..config.load import read_file
from ..config.settings import flat
from ..errors import ConfigError
from . import wording
from .result import Run, RunsError, read

if TYPE_CHECKING:
    from rich.table import Table

UNREADABLE = "unreadable"


def find(folder: Path) -> List[Run]:
    """The runs below ``folder``, oldest first; one that cannot be read is listed as such.

    Raises:
        RunsError: there is none.
    """
    if not folder.is_dir():
        raise RunsError(f"there is no folder {folder}; runs lie in the folder that `output` says")
    places = [path.parent for path in sorted(folder.glob("*/config.yaml")) if path.is_file()]
    if not places:
        raise RunsError(f"{folder} holds no run; `python -m trainer train` makes one")
    return sorted(map(_read_or_warn, places), key=lambda run: run.started or "")


def _read_or_warn(folder: Path) -> Run:
    try:
        return read(folder)
    except RunsError as error:
        console.warn(str(error))
        figures: Dict[str, Any] = dict.fromkeys(Run._fields)
        figures.update(name=folder.name, state=UNREADABLE, step=0)
        return Run(**figures)


def as_table(runs: List[Run], width: int) -> Table:
    """A row for each run, with as many columns as fit into ``width`` characters."""
    from rich.cells import cell_len
    from rich.table import Table  # imported late: writing a result does not need it

    rows = [_cells(run) for run in runs]
    widths = {
        title: max(cell_len(row[title]) for row in (*rows, {title: title})) for title in rows[0]
    }
    widths["run"] = min(widths["run"], _FOLDED_NAME)
    for title in _LEFT_OUT_FIRST:
        if sum(widths.values()) + _BETWEEN * (len(widths) - 1) > width:
            del widths[title]
    table = Table(box=None, pad_edge=False)
    for title in widths:
        justify: Any = "left" if title in ("run", "state") else "right"
        table.add_column(title, justify=justify, overflow="fold", no_wrap=title != "run")
    for row in rows:
        table.add_row(*(row[title] for title in widths))
    return table


_LEFT_OUT_FIRST = ("started (UTC)", "epochs", "images/s", "ranks", "minutes", "best")
_FOLDED_NAME = 20  # characters of a name, at least, that stay in one line
_BETWEEN = 2  # blanks between columns


def _cells(run: Run) -> Dict[str, str]:
    return {
        "run": console.one_line(run.name),
        "started (UTC)": _shown(run.started and run.started[:16].replace("T", " ")),
        "state": console.one_line(run.state),
        "steps": f"{run.step}/{_shown(run.last_step)}",
        "epochs": _shown(run.epochs),
        "ranks": _shown(run.ranks),
        "accuracy": _shown(run.accuracy, ".4f"),
        "best": _shown(run.best_accuracy, ".4f"),
        "images/s": _shown(run.images_per_second, ".0f"),
        "minutes": "" if run.seconds is None else wording.minutes(run.seconds),
    }


class Comparison(NamedTuple):
    """The differences between two runs: [first, second] by name."""

    settings: Dict[str, List[Any]]  # by dotted name
    results: Dict[str, List[Any]]  # by field of Run


def compare(first: Path, second: Path) -> Comparison:
    """The differences between the runs in two folders.

    Raises:
        RunsError: one of the folders holds no run.
    """
    results = [read(folder)._asdict() for folder in (first, second)]
    settings = [_settings(folder) for folder in (first, second)]
    return Comparison(_different(*settings), _different(*results))


def comparison_table(comparison: Comparison, first: Path, second: Path) -> Table:
    """A row for each setting and then each result that differs."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    for folder in (first, second):
        table.add_column(console.one_line(str(folder)), overflow="fold")
    for name, values in {**comparison.settings, **comparison.results}.items():
        table.add_row(
            console.one_line(name),
            *(_shown(v, ".4g" if isinstance(v, float) else "") for v in values),
        )
    return table


def _different(first: Dict[str, Any], second: Dict[str, Any]) -> Dict[str, List[Any]]:
    pairs = {name: [first.get(name), second.get(name)] for name in {**first, **second}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _settings(folder: Path) -> Dict[str, Any]:
    try:
        return flat(read_file(str(folder / "config.yaml")))
    except ConfigError as error:
        raise RunsError(str(error)) from None


def _shown(value: Any, form: str = "") -> str:
    return "" if value is None else format(value, form) if form else console.one_line(str(value))

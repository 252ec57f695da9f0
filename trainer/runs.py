"""Lists and compares past runs, from the files in their folders.

Rank 0 writes ``result.json``: at the start with the state ``unfinished``, at the end with the
results. The progress of a run that was killed is read from its checkpoints.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional

from . import checkpoint, config_file, console, whole_file, wording
from .settings import ConfigError, UserError, flat

if TYPE_CHECKING:
    from rich.table import Table

RESULT = "result.json"
UNREADABLE = "unreadable"


class RunsError(UserError):
    """There is no run where one was looked for: where, what is there, the fix."""


class Run(NamedTuple):
    """What is known about a run; None where a value is unknown."""

    name: str
    started: Optional[str]  # ISO 8601, UTC
    # done, stopped (by a signal; resumes when trained again), stopped early (by train.patience),
    # unfinished or unreadable
    state: str
    step: int  # steps made and saved
    last_step: Optional[int]  # where it ends, unless it stops early
    epochs: Optional[int]  # as configured
    ranks: Optional[int]
    accuracy: Optional[float]  # of the last evaluation of the test set
    loss: Optional[float]
    best_accuracy: Optional[float]
    images_per_second: Optional[float]
    seconds: Optional[float]  # of the process that ended it


def write_result(folder: Path, **figures: Any) -> None:
    """Replace a run's ``result.json`` atomically."""
    with whole_file.replaced(folder / RESULT) as partial:
        partial.write_text(json.dumps(figures, indent=1) + "\n")


def now() -> str:
    """The current time in the format of ``result.json``: ISO 8601, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def read(folder: Path) -> Run:
    """The run in ``folder``.

    Raises:
        RunsError: there is none, or its files cannot be read.
    """
    if not (folder / "config.yaml").is_file():
        raise RunsError(
            f"{folder} is no run: it holds no config.yaml; see `python -m trainer runs FOLDER`"
        )
    figures: Dict[str, Any] = {"state": "unfinished"}
    if (folder / RESULT).is_file():
        figures.update(_json(folder / RESULT))
    if figures["state"] == "unfinished":
        figures.update(_saved(folder / "checkpoints"))
    known: Dict[str, Any] = {name: figures.get(name) for name in Run._fields}
    for name, value in known.items():
        expected = str if name in ("name", "started", "state") else (int, float)
        if value is not None and not isinstance(value, expected):
            raise RunsError(f"{folder / RESULT} cannot be read: {name} is {value!r}")
    return Run(**{**known, "name": folder.name, "step": known["step"] or 0})


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
        "run": run.name,
        "started (UTC)": _shown(run.started and run.started[:16].replace("T", " ")),
        "state": run.state,
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
        table.add_column(str(folder), overflow="fold")
    for name, values in {**comparison.settings, **comparison.results}.items():
        table.add_row(name, *(_shown(v, ".4g" if isinstance(v, float) else "") for v in values))
    return table


def _different(first: Dict[str, Any], second: Dict[str, Any]) -> Dict[str, List[Any]]:
    pairs = {name: [first.get(name), second.get(name)] for name in {**first, **second}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _settings(folder: Path) -> Dict[str, Any]:
    try:
        return flat(config_file.read(str(folder / "config.yaml")))
    except ConfigError as error:
        raise RunsError(str(error)) from None


def _json(path: Path) -> Dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunsError(f"{path} cannot be read: {error}") from None


def _saved(checkpoints: Path) -> Dict[str, Any]:
    """The progress of an unfinished run, from its checkpoints."""
    for path in reversed(checkpoint.listing(checkpoints)):
        with contextlib.suppress(OSError, ValueError, RecursionError):  # damaged: try an older one
            state = checkpoint.read_state(path)
            best = checkpoint.find_best(checkpoints)
            return {
                "step": state["step"],
                "accuracy": state["accuracy"],
                "best_accuracy": checkpoint.read_state(best)["accuracy"] if best else None,
            }
    return {}


def _shown(value: Any, form: str = "") -> str:
    return "" if value is None else format(value, form) if form else str(value)

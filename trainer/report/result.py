"""A run's ``result.json``, what is known of runs from the files in their folders, and tables of it.

Rank 0 writes ``result.json``: at the start with the state ``unfinished``, at the end with the
results. The progress of a run that was killed is read from its checkpoints.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from .. import checkpoint, console
from ..checkpoint import whole_file
from ..config import Config, recorded, to_dict
from ..config.load import read_file
from ..config.settings import flat
from ..errors import ConfigError, UserError
from . import wording

RESULT, _CONFIG = "result.json", "config.yaml"
Comparison = Dict[str, Dict[str, List[Any]]]  # [first, second] by dotted setting or field of Run


class RunsError(UserError):
    """There is no run where one was looked for: where, what is there, the fix."""


class Run(NamedTuple):
    """What is known about a run; None where a value is unknown."""

    name: str
    started: Optional[str] = None  # ISO 8601, UTC
    # done, stopped (by a signal; resumes when trained again), stopped early (by train.patience),
    # unfinished or unreadable
    state: str = "unfinished"
    step: int = 0  # steps made and saved
    last_step: Optional[int] = None  # where it ends, unless it stops early
    epochs: Optional[int] = None  # as configured
    ranks: Optional[int] = None
    accuracy: Optional[float] = None  # of the last evaluation, on the validation or else test set
    loss: Optional[float] = None
    best_accuracy: Optional[float] = None
    images_per_second: Optional[float] = None
    seconds: Optional[float] = None  # of the process that ended it
    test_accuracy: Optional[float] = None  # beside a validation set


def write_result(folder: Path, **figures: Any) -> None:
    """Replace a run's ``result.json`` atomically."""
    with whole_file.replaced(folder / RESULT) as partial:
        partial.write_text(json.dumps(wording.finite(figures), indent=1) + "\n")


def now() -> str:
    """The current time in the format of ``result.json``: ISO 8601, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def read(folder: Path) -> Run:
    """The run in ``folder``. Raises RunsError: there is none, or its files cannot be read."""
    if not (folder / _CONFIG).is_file():
        raise RunsError(
            f"{folder} is no run: it holds no config.yaml; see `python -m trainer runs FOLDER`"
        )
    figures: Dict[str, Any] = {"state": "unfinished"}
    path = folder / RESULT
    try:
        if path.is_file():
            figures.update(json.loads(path.read_text(), parse_constant=lambda _: None))  # old NaN
    except (OSError, ValueError, TypeError) as error:
        raise RunsError(f"{path} cannot be read: {error}") from None
    if figures["state"] == "unfinished":
        figures.update(_saved(folder / "checkpoints"))
    known: Dict[str, Any] = {name: figures.get(name) for name in Run._fields}
    for name, value in known.items():
        expected = str if name in ("name", "started", "state") else (int, float)
        if value is not None and not isinstance(value, expected):
            raise RunsError(f"{path} cannot be read: {name} is {value!r}")
    return Run(**{**known, "name": folder.name, "step": known["step"] or 0})


def tells_the_end(folder: Path) -> bool:
    """Whether ``result.json`` does; not if the run was killed after its last save, or stopped."""
    try:
        return read(folder).state not in ("unfinished", "stopped")
    except RunsError:
        return False


def _saved(checkpoints: Path) -> Dict[str, Any]:
    """The progress of an unfinished run, from its checkpoints that are not damaged."""
    states = [*checkpoint.states(checkpoints).values()]
    if not states:
        return {}
    best = max((s.accuracy for s in states if s.accuracy is not None), default=None)
    return {"step": states[-1].step, "accuracy": states[-1].accuracy, "best_accuracy": best}


def find(folder: Path) -> List[Run]:
    """The runs below ``folder``, or that in it, oldest first; one that cannot be read is listed as
    such. Raises RunsError: there is none.
    """
    if not folder.is_dir():
        raise RunsError(f"there is no folder {folder}; runs lie in the folder that `output` says")
    configs = [folder / _CONFIG, *sorted(folder.glob(f"*/{_CONFIG}"))]
    places = [path.parent for path in configs if path.is_file()]
    if not places:
        raise RunsError(f"{folder} holds no run; `python -m trainer train` makes one")
    runs = []
    for place in places:
        try:
            runs.append(read(place))
        except RunsError as error:
            console.warn(str(error))
            runs.append(Run(place.name, state="unreadable"))
    return sorted(runs, key=lambda run: run.started or "")


_LEFT_OUT_FIRST = ("started (UTC)", "epochs", "images/s", "ranks", "minutes", "best")


def as_table(runs: List[Run], width: int) -> str:
    """A row for each run, with as many columns as fit into ``width`` characters."""
    rows = [_cells(run) for run in runs]
    # A column of its own only where there are validation sets, of which "accuracy" then is.
    titles = [title for title in rows[0] if title != "test" or any(row["test"] for row in rows)]
    for left_out in ("", *_LEFT_OUT_FIRST):
        titles = [title for title in titles if title != left_out]
        table = console.aligned([titles, *([row[title] for title in titles] for row in rows)])
        if max(map(len, table.splitlines())) <= width:
            break
    return table


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
        "test": _shown(run.test_accuracy, ".4f"),
        "images/s": _shown(run.images_per_second, ".0f"),
        "minutes": "" if run.seconds is None else wording.minutes(run.seconds),
    }


def compare(first: Path, second: Path) -> Comparison:
    """The differences between the runs in two folders: ``settings`` and ``results``, by name.
    Raises RunsError: one of the folders holds no run.
    """
    results = [read(folder)._asdict() for folder in (first, second)]
    settings = [_settings(folder) for folder in (first, second)]
    return {"settings": _different(*settings), "results": _different(*results)}


def comparison_table(comparison: Comparison, first: Path, second: Path) -> str:
    """A row for each setting and then each result that differs."""
    given = {"": [str(first), str(second)], **comparison["settings"]}  # shown in full
    shown = {name: [_shown(value) for value in pair] for name, pair in given.items()}
    for name, pair in comparison["results"].items():
        shown[name] = [_shown(value, ".4g" * isinstance(value, float)) for value in pair]
    return console.aligned([[console.one_line(name), *pair] for name, pair in shown.items()])


def _different(first: Dict[str, Any], second: Dict[str, Any]) -> Dict[str, List[Any]]:
    pairs = {name: [first.get(name), second.get(name)] for name in {**first, **second}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _settings(folder: Path) -> Dict[str, Any]:
    """The run's, by dotted name; those that an older version did not know have their defaults."""
    try:
        known = recorded(read_file(str(folder / _CONFIG)))
        return {**flat(to_dict(Config())), **flat(known)}
    except ConfigError as error:
        raise RunsError(str(error)) from None


def _shown(value: Any, form: str = "") -> str:
    return "" if value is None else format(value, form) if form else console.one_line(str(value))

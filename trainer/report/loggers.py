"""Where a run's points go, by name (``monitor.loggers``); on rank 0 alone.

Weights & Biases and MLflow are used where they are installed; their own environment variables say
where they log to (``WANDB_MODE=offline``, ``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``).
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence

from ..checkpoint import whole_file
from ..config import Config, to_dict
from ..config.schema import decides_result
from ..config.settings import flat
from ..console import warn
from ..errors import ConfigError, describe_error

EVENTS = "events"  # TensorBoard's folder in the run's
_IDS = "loggers.json"  # in the run's folder: what others call the run, for a resume


def check(names: Sequence[str]) -> None:
    """Refuse loggers that are not installed. Raises ConfigError: naming one."""
    for name in names:
        if name in ("wandb", "mlflow") and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"monitor.loggers has {name}, which is not installed; `pip install {name}`, or "
                "leave it out"
            )


class Loggers:
    """The loggers of a run. Raises ConfigError: one cannot be started.

    Later points of an earlier process than ``first_step``, where the run resumes, are dropped, by
    Weights & Biases and MLflow as far as they do that. ``warn`` is told of a logger that fails in
    mid-run, and then gets nothing more. Every call does nothing unless it ``writes``.
    """

    def __init__(
        self, config: Config, first_step: int, warn: Callable[[str], Any], writes: bool = True
    ):
        self._warn = warn
        self._open: Dict[str, Any] = {}
        for name in dict.fromkeys(config.monitor.loggers) if writes else ():
            try:
                self._open[name] = _KINDS[name](config, first_step)
            except Exception as error:  # of software that is not ours
                self.close(failed=True)
                known = config.folder / _IDS
                anew = f"; without {known} it begins another run there" * known.is_file()
                raise ConfigError(
                    f"monitor.loggers has {name}, which cannot be started: {describe_error(error)}"
                    + anew * (first_step > 0)
                ) from error

    def scalars(self, values: Mapping[str, Optional[float]], step: int) -> None:
        """Log points after ``step`` steps, by tag; None is skipped."""
        known = {tag: float(value) for tag, value in values.items() if value is not None}
        self.each("scalars", known, step)

    def close(self, failed: bool = False) -> None:
        """Hand over what is pending, and whether the run ``failed``."""
        self.each("close", failed)
        self._open = {}

    def each(self, method: str, *given: Any) -> None:
        """Call that method of each logger that has it: TensorBoard alone takes pictures."""
        for name, logger in list(self._open.items()):
            try:
                getattr(logger, method, lambda *_: None)(*given)
            except Exception as error:  # a server that is gone, a full disk: the run goes on
                del self._open[name]
                self._warn(f"logger {name} gets nothing more: {describe_error(error)}")


def _tensorboard(config: Config, first_step: int) -> Any:
    from .tensorboard import Monitor  # late: other ranks need not load tensorboardX

    return Monitor(config.folder / EVENTS, first_step)


class AppendedFile:
    """A file that is made again, whole, where it was removed, and keeps in memory what the disk has
    no room for; raises OSError where it cannot be created.
    """

    def __init__(self, path: Path):
        self._path, self._pending, self._warned = path, bytearray(), False
        self._open()

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115

    def append(self, content: bytes) -> None:
        """Add ``content``, in memory until :meth:`flush`."""
        self._pending += content

    def flush(self) -> None:
        """Write what is pending; warn once where there is no room, and keep it."""
        try:
            if not self._path.exists():  # removed or renamed, but still open: written once more
                self._file.seek(0)
                written = self._file.read()
                self._open()
                self._pending[:0] = written
            while self._pending:
                del self._pending[: self._file.write(self._pending)]
            self._warned = False
        except OSError as error:
            if not self._warned:
                warn(f"{self._path} cannot be written ({error.strerror}); its points wait for room")
            self._warned = True

    def close(self, failed: bool = False) -> None:
        """Flush once more and close the file."""
        self.flush()
        self._file.close()


class _Csv(AppendedFile):
    """``metrics.csv`` in the run's folder: a row for each point."""

    def __init__(self, config: Config, first_step: int):
        path = config.folder / "metrics.csv"
        kept: List[List[str]] = []
        if first_step and path.is_file():
            with open(path, newline="", encoding="utf-8") as before:
                rows = list(csv.reader(before))[1:]
            # The last may be cut short, by a kill.
            kept = [r for r in rows if len(r) == 3 and r[0].isdigit() and int(r[0]) <= first_step]
        with whole_file.replaced(path) as partial:
            partial.write_bytes(_as_csv([["step", "tag", "value"], *kept]))
        super().__init__(path)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.append(_as_csv([step, tag, repr(v)] for tag, v in values.items()))
        self.flush()


def _as_csv(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


class _Wandb:
    def __init__(self, config: Config, first_step: int):
        import wandb

        users = wandb.run  # which gets the points, and goes on after this run
        self._ends = users is None
        own = (_ids(config).get("wandb") if first_step else None) or uuid.uuid4().hex[:8]
        _remember(config, "wandb", own if users is None else str(users.id))
        named: Dict[str, Any] = {"id": own, "name": config.name, "dir": str(config.folder)}
        self._run = users or wandb.init(resume="allow", config=settings_of(config), **named)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        # Its steps never go back, and in a run of the user's own they are not only this run's.
        how, more = ({"step": step}, {}) if self._ends else ({}, {"step": step})
        self._run.log({**values, **more}, **how)

    def close(self, failed: bool) -> None:
        if self._ends:
            self._run.finish(exit_code=int(failed))


class _MLflow:
    def __init__(self, config: Config, first_step: int):
        # A server that falls silent would hold up training for longer than the watchdog allows.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow

        self._mlflow = mlflow
        known = _ids(config).get("mlflow") if first_step else None
        which = {"run_id": known} if known else {"run_name": config.name}
        run = mlflow.start_run(nested=True, **which)  # in the user's own, if any
        if known:
            return
        try:
            # Patterns of parameters' names hold characters that MLflow takes in no name.
            settings = settings_of(config).items()
            mlflow.log_params({re.sub(r"[^-\w./ :]", "_", name): v for name, v in settings})
            _remember(config, "mlflow", str(run.info.run_id))
        except BaseException:
            mlflow.end_run("FAILED")  # or the next run of this process could not begin
            raise

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


_KINDS: Dict[str, Callable[[Config, int], Any]] = {
    "tensorboard": _tensorboard,
    "csv": _Csv,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}


def settings_of(config: Config) -> Dict[str, Any]:
    """The settings that decide the result, by dotted name."""
    return {name: v for name, v in flat(to_dict(config)).items() if decides_result(name)}


def _remember(config: Config, name: str, called: str) -> None:
    ids = {**_ids(config), name: called, "folder": str(config.folder.resolve())}
    with whole_file.replaced(config.folder / _IDS) as partial:
        partial.write_text(json.dumps(ids))


def _ids(config: Config) -> Dict[str, str]:
    """What loggers call the run, by their names; a copy (``cp -r``) is another run."""
    path = config.folder / _IDS
    ids = dict(json.loads(path.read_text())) if path.is_file() else {}
    first = Path(ids.get("folder", path.parent)) / _IDS  # elsewhere where it was moved or copied
    others = json.loads(first.read_text()) if first.is_file() and not first.samefile(path) else {}
    return {name: called for name, called in ids.items() if others.get(name) != called}

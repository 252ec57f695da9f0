"""Where a run's points go, by name (``monitor.loggers``); on rank 0 alone.

Weights & Biases and MLflow are used where they are installed; their own environment variables say
where they log to (``WANDB_MODE=offline``, ``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``).
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import uuid
from pathlib import Path
from typing import IO, Any, Callable, Dict, List, Mapping, Optional, Sequence

from ..checkpoint import whole_file
from ..config import Config, decides_result, to_dict
from ..config.settings import flat
from ..errors import ConfigError, describe_error

EVENTS = "events"  # TensorBoard's folder in the run's
_IDS = "loggers.json"  # in the run's folder: what others call the run, for a resume


def check(names: Sequence[str]) -> None:
    """Refuse loggers that are not installed.

    Raises:
        ConfigError: naming one.
    """
    for name in names:
        if name in ("wandb", "mlflow") and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"monitor.loggers has {name}, which is not installed; `pip install {name}`, or "
                "leave it out"
            )


class Loggers:
    """The loggers of a run.

    Args:
        first_step: where the run resumes; later points of an earlier process are dropped, by
            Weights & Biases and MLflow as far as they do that.
        warn: told of a logger that fails in mid-run, and then gets nothing more.
        writes: open them; otherwise every call does nothing.

    Raises:
        ConfigError: one cannot be started.
    """

    def __init__(
        self, config: Config, first_step: int, warn: Callable[[str], Any], writes: bool = True
    ):
        self._warn = warn
        self._open: Dict[str, Any] = {}
        for name in config.monitor.loggers if writes else ():
            try:
                self._open[name] = _KINDS[name](config, first_step)
            except Exception as error:  # of software that is not ours
                raise ConfigError(
                    f"monitor.loggers has {name}, which cannot be started: {describe_error(error)}"
                ) from error

    def scalars(self, values: Mapping[str, Optional[float]], step: int) -> None:
        """Log points after ``step`` steps, by tag; None is skipped."""
        known = {tag: float(value) for tag, value in values.items() if value is not None}
        self.each("scalars", known, step)

    def close(self) -> None:
        """Hand over what is pending."""
        self.each("close")
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


class _Csv:
    """``metrics.csv`` in the run's folder: a row for each point."""

    def __init__(self, config: Config, first_step: int):
        path = config.folder / "metrics.csv"
        kept: List[List[str]] = []
        if first_step and path.is_file():
            with open(path, newline="", encoding="utf-8") as before:
                rows = list(csv.reader(before))[1:]
            # The last may be cut short, by a kill.
            kept = [r for r in rows if len(r) == 3 and r[0].isdigit() and int(r[0]) <= first_step]
        with whole_file.replaced(path) as partial, _opened(partial, "w") as file:
            csv.writer(file).writerows([["step", "tag", "value"], *kept])
        self._path, self._file = path, _opened(path, "a+")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if not self._path.exists():  # removed or renamed with the folder, but still open
            self._file.seek(0)
            written = self._file.read()
            self._file.close()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _opened(self._path, "a+")
            self._file.write(written)
        csv.writer(self._file).writerows([step, tag, repr(v)] for tag, v in values.items())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _opened(path: Path, mode: str) -> IO[str]:
    return open(path, mode, newline="", encoding="utf-8")


class _Wandb:
    def __init__(self, config: Config, first_step: int):
        import wandb

        known = _id(config, "wandb", lambda: uuid.uuid4().hex[:8], first_step)
        self._run = wandb.init(
            id=known,
            resume="allow",
            name=config.name,
            dir=str(config.folder),
            config=settings_of(config),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, config: Config, first_step: int):
        # A server that falls silent would hold up training for longer than the watchdog allows.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow

        self._mlflow = mlflow
        made: List[Any] = []

        def new() -> str:
            made.append(mlflow.start_run(run_name=config.name))
            # Patterns of parameters' names hold characters that MLflow takes in no name.
            mlflow.log_params(
                {re.sub(r"[^-\w./ :]", "_", k): v for k, v in settings_of(config).items()}
            )
            return str(made[0].info.run_id)

        try:
            known = _id(config, "mlflow", new, first_step)
            if not made:
                mlflow.start_run(run_id=known)
        except BaseException:
            mlflow.end_run("FAILED")  # or the next run of this process could not begin
            raise

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_KINDS: Dict[str, Callable[[Config, int], Any]] = {
    "tensorboard": _tensorboard,
    "csv": _Csv,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}


def settings_of(config: Config) -> Dict[str, Any]:
    """The settings that decide the result, by dotted name."""
    return {name: v for name, v in flat(to_dict(config)).items() if decides_result(name)}


def _id(config: Config, name: str, new: Callable[[], str], first_step: int) -> str:
    """What the logger of that name calls the run: as before if it is resumed, or ``new``."""
    path = Path(config.folder) / _IDS
    known = json.loads(path.read_text()) if path.is_file() else {}
    if not first_step or name not in known:
        known[name] = new()
        with whole_file.replaced(path) as partial:
            partial.write_text(json.dumps(known))
    return str(known[name])

"""Data-parallel training of Gluon nets on Horovod: what happens inside a rank.

``from trainer import Config, fit`` and ``fit(net, Config())``, in a notebook or on each rank.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

# Every public name and where it is defined. Loaded on first use: importing this package loads no
# MXNet, because the command line has to set the number of threads before that.
_PUBLIC = {
    "Config": "trainer.config",
    "ConfigError": "trainer.errors",
    "EpochEnd": "trainer.run.outcome",
    "EvaluationEnd": "trainer.run.outcome",
    "Result": "trainer.run.outcome",
    "StepEnd": "trainer.run.outcome",
    "SyncBatchNorm": "trainer.batch_norm",
    "TrainingError": "trainer.run.outcome",
    "convert_sync_batch_norm": "trainer.batch_norm",
    "empty_batch": "trainer.batch_norm",
    "fit": "trainer.run.loop",
    "revert_sync_batch_norm": "trainer.batch_norm",
    "sharding": "trainer.data.sharding",  # a module of functions
}

__all__ = sorted([*_PUBLIC, "__version__"])

if os.path.expanduser("~") == "~":
    # A user id without an account (containers), and no HOME: matplotlib would fail in mid-run.
    os.environ["HOME"] = "/"  # as Docker sets it


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("trainer.console").version()
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    environment = importlib.import_module("trainer.dist.environment")
    environment.check_counts()
    if "mxnet" not in sys.modules and environment.size() > 1:
        importlib.import_module("trainer.dist.device").share_cores()
    module = importlib.import_module(_PUBLIC[name])
    return module if _PUBLIC[name].endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

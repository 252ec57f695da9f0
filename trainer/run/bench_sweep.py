"""A benchmark over settings and numbers of ranks: one job per combination, one after another.

Each has its own processes, so that peak memory and compiled nets are its own. This is the only
module in ``trainer/`` that knows the launcher, by its command line.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from .. import config
from ..console import print_line
from ..errors import ConfigError


class Combination(NamedTuple):
    """The settings of one job of a sweep."""

    ranks: int
    overrides: Tuple[str, ...]  # setting=value


def combinations(sweeps: Sequence[str], ranks: str) -> List[Combination]:
    """Every number of ranks with every value of every setting; the last setting varies fastest.

    Args:
        sweeps: ``setting=value,value,...``; commas within brackets do not separate values.
        ranks: ``1,2,4``.

    Raises:
        ConfigError: one of them is malformed.
    """
    counts = ranks.split(",")
    if not all(re.fullmatch(r"[1-9]\d*", count) for count in counts):
        raise ConfigError(f"--ranks is {ranks!r}; it must be whole numbers from 1, e.g. 1,2,4")
    settings = [_values(text) for text in sweeps]
    return [
        Combination(int(count), overrides)
        for count in counts
        for overrides in itertools.product(*settings)
    ]


def _values(text: str) -> List[str]:
    name, equals, values = text.partition("=")
    if not (name and equals and values):
        raise ConfigError(
            f"--sweep is {text!r}; it must read setting=value,value, "
            "e.g. train.global_batch_size=64,128"
        )
    return [f"{name}={value}" for value in re.split(r",(?![^\[{]*[\]}])", values)]


def measure(
    path: Optional[str],
    overrides: Sequence[str],
    chosen: Sequence[Combination],
    options: Sequence[str],
) -> List[Dict[str, Any]]:
    """Run each combination on this machine; what its ``bench --json`` wrote.

    Args:
        path, overrides: the config that all combinations share.
        options: further options of ``bench``.

    Raises:
        ConfigError: a combination is invalid, found before any is started; or one failed, for the
            reason that its ranks have printed to standard error.
    """
    for combination in chosen:
        config.load(path, [*overrides, *combination.overrides])
    words = [*([path] if path else []), *overrides, *options]
    return [_run(combination, words) for combination in chosen]


def _run(combination: Combination, words: Sequence[str]) -> Dict[str, Any]:
    what = " ".join((f"ranks={combination.ranks}", *combination.overrides))
    print_line(f"measuring {what}", sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "figures.json")
        launcher = [sys.executable, "-m", "launch", "local", "-n", str(combination.ranks)]
        bench = [sys.executable, "-m", "trainer", "bench", *words, *combination.overrides]
        command = [*launcher, "--quiet", "--", *bench, "--json", str(result)]
        code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        if code:
            raise ConfigError(f"the bench of {what} ended with exit code {code}; see above")
        return dict(json.loads(result.read_text()))

"""What the benchmark of drawn inputs takes for bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
from hypothesis import strategies as st

from benchmarks import fuzz
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ConfigError("no such thing"), "refused"),
        (click.UsageError("no such option"), "refused"),
        (ConfigError("two\nlines"), "other than one line"),
        (ConfigError(""), "other than one line"),
        (KeyError("x"), "Traceback"),
    ],
)
def test_all_but_one_line_is_bad(error: Exception, outcome: str) -> None:
    def read(drawn: Any, folder: Path) -> NoReturn:
        raise error

    assert outcome in fuzz._try(fuzz.Kind(st.none(), read), None)


def test_the_same_seed_draws_the_same(tmp_path: Path) -> None:
    def drawn(seed: int) -> list:
        found: list = []
        kind = fuzz.Kind(st.binary(), lambda drawn, folder: found.append(drawn))
        assert fuzz._outcomes(kind, 20, seed) == ["read"] * 20
        return found

    assert drawn(1) == drawn(1) != drawn(2)

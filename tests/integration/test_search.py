"""The programs of docs/search.md, with a small net on the sample and fewer runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.documents import blocks

from .commands import ROOT, run

FEW = (
    '"model.factory=tests.integration.nets:small", "data.dataset=fashion_mnist_sample", '
    '"train.max_steps=3", '
)
PROGRAMS = [b.text for b in blocks(ROOT / "docs" / "search.md") if b.language == "python"]


@pytest.mark.parametrize(("program", "runs"), zip(PROGRAMS, (2, 2)), ids=("rate", "sweep"))
def test_a_search_runs_as_the_page_says(tmp_path: Path, program: str, runs: int) -> None:
    body = [line for line in program.splitlines() if line and not line.startswith("import")]
    assert len(body) <= 10, "ten lines of Python"
    script = tmp_path / "search.py"
    small = program.replace('load("quickstart", [', f'load("quickstart", [{FEW}')
    fewer = {"_steps=30": "_steps=3", "(0.01, 0.03, 0.1, 0.3)": "(0.01, 0.1)", "(0, 5e-4)": "(0,)"}
    for words, few in fewer.items():
        small = small.replace(words, few)
    script.write_text(small)
    where = ["env", "-C", str(tmp_path), f"PYTHONPATH={ROOT}"]
    done = run([*where, sys.executable, str(script)])
    assert done.code == 0, done.out + done.err
    assert len(list(tmp_path.glob("runs/*/result.json"))) == runs
    assert re.search(r"0\.\d+", done.out.splitlines()[-1])

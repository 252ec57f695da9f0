"""docs/notebook.ipynb, executed from top to bottom as Jupyter does; the seed's cells in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import List

import nbformat
import pytest
from nbclient import NotebookClient

from .test_notebook_use import SEED

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
SMALL = "data.dataset=fashion_mnist_sample train.max_steps=3 monitor.every_steps=1"


def _code(notebook: nbformat.NotebookNode) -> List[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def _text(cell: nbformat.NotebookNode) -> str:
    """All that a cell printed and showed as text."""
    outputs = cell.get("outputs", [])
    return "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)


def _pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/svg+xml" in output.get("data", {}) for output in outputs)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
    """The notebook after a run on a few images, in a folder of its own."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOTEBOOK_SETTINGS", SMALL)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=300, resources=resources).execute()
    return notebook


def test_it_runs_from_top_to_bottom_on_two_ranks(executed: nbformat.NotebookNode) -> None:
    said = "\n".join(map(_text, executed.cells))
    assert "(1, 512, 7, 7)" in said, "the seed's shapes"
    assert "[0] 2 ranks on cpu, global batch 256, 128 a rank" in said
    assert "[0] done: test accuracy" in said and "(500 images)" in said
    assert _pictures(executed) == 3, "images, loss, predictions"


def test_the_seeds_code_stands_in_it_unchanged() -> None:
    code = "\n".join(_code(nbformat.read(NOTEBOOK, as_version=4)))
    for line in filter(None, map(str.rstrip, SEED.splitlines())):
        assert line in code
    ours = code[code.index("import launch") :]
    assert "nn." not in ours, "the net is the seed's"


def test_the_committed_outputs_are_of_a_whole_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    said = "\n".join(map(_text, notebook.cells))
    assert "60000 training and 10000 test images" in said and "(10000 images)" in said
    accuracy = float(re.search(r"done: test accuracy (0\.\d+)", said)[1])
    assert accuracy > 0.8 and _pictures(notebook) == 3
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "executed once, in order"
    assert len(NOTEBOOK.read_bytes()) < 500_000

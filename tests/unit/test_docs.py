"""The documents agree with the code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Set

import pytest
from click.testing import CliRunner

from benchmarks.chaos import with_table
from tests.documents import DOCUMENTS, ROOT
from trainer import settings_table
from trainer.__main__ import main


def test_configuration_page_is_what_the_settings_say() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == settings_table.as_markdown(), "python -m trainer.settings_table > docs/..."


def anchors(page: Path) -> Set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in link:
            target, _, anchor = link.partition("#")
            page = document.parent / target if target else document
            assert page.exists(), link
            assert not anchor or anchor in anchors(page), link


def test_readme_is_short() -> None:
    for readme in ROOT.glob("README*.md"):
        assert len(readme.read_text(encoding="utf-8").splitlines()) < 200


def test_each_test_that_proves_a_promise_is_there() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(names) > 15
    for name in names:
        assert f"def {name}(" in tests, name


def test_readme_and_help_list_every_command() -> None:
    readme, shown = (ROOT / "README.md").read_text(), CliRunner().invoke(main, ["--help"]).output
    for name in main.commands:
        assert f"python -m trainer {name}" in readme, name
        assert re.search(rf"^  {name}  +\w", shown, re.MULTILINE), f"{name} says what it does"


def test_the_table_of_the_trials_holds_their_figures() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "chaos.json").read_text())
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert page == with_table(page, results), "python -m benchmarks.chaos writes it"
    assert str(results["figures"]["seconds to recover, worst"]) in page


@pytest.mark.parametrize("package", ["trainer", "launch"])
def test_every_file_has_its_place_on_the_map(package: str) -> None:
    page = (ROOT / "docs" / "how_it_works.md").read_text()
    part = page.split(f"In `{package}/`:")[1].split("In `")[0]
    table = "".join(re.findall(r"^\|[^|]*(\|.*)", part, re.MULTILINE))
    placed = re.findall(r"`(\w+|\w+\.(?:cc|h))`", table)
    files = [path.stem for path in (ROOT / package).glob("*.py") if path.stem != "__init__"]
    files += [path.name for path in (ROOT / package).glob("native/*")]
    assert sorted(placed) == sorted(files)


def test_batch_norm_can_be_taken_out_of_the_project(tmp_path: Path) -> None:
    """With the files that its page names, and no other."""
    page = (ROOT / "docs" / "batch_norm.md").read_text()
    (named,) = re.findall(
        r"`trainer/(batch_norm\.py)` and\s`trainer/(running_statistics\.py)` have.*?"
        r"nothing else of this project but\s(.*?)\.\n",
        page,
        re.S,
    )
    taken = tmp_path / "taken"
    shutil.copytree(ROOT / "trainer" / "native", taken / "native")
    for name in [*named[:2], *re.findall(r"`(\w+\.py)`", named[2])]:
        shutil.copy(ROOT / "trainer" / name, taken)
    code = (
        "import mxnet as mx; from taken.batch_norm import SyncBatchNorm; "
        "from taken.running_statistics import calibrate; "
        "net = SyncBatchNorm(in_channels=3); net.initialize(); "
        "calibrate(net, [(mx.nd.ones((2, 3)), 2)]); print(net.running_mean.data().asnumpy())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.stdout.endswith("[1. 1. 1.]\n"), done.stdout

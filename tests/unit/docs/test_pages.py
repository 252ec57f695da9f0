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
from trainer.cli.main import main
from trainer.config.table import as_markdown


def test_configuration_page_is_what_the_settings_say() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == as_markdown(), "python -m trainer.config.table > docs/..."


def anchors(page: Path) -> Set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


EACH_PAGE = pytest.mark.parametrize(
    "document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda path: str(path.relative_to(ROOT))
)
MADE_BY_USERS = {"configs/site.yaml"}


@EACH_PAGE
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in link:
            target, _, anchor = link.partition("#")
            page = document.parent / target if target else document
            assert page.exists(), link
            assert not anchor or anchor in anchors(page), link


@EACH_PAGE
def test_files_and_tests_that_are_named_are_there(document: Path) -> None:
    rooms = "trainer|launch|tests|benchmarks|configs|containers|docs"
    text = document.read_text(encoding="utf-8")
    for path, test in re.findall(rf"`((?:{rooms})/[^`\s:]*)(?:::(\w+))?`", text):
        assert path in MADE_BY_USERS or (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(), test


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


def test_the_numbers_of_drawn_inputs_are_those_of_the_results() -> None:
    figures = json.loads((ROOT / "benchmarks" / "results" / "fuzz.json").read_text())["figures"]
    page = " ".join((ROOT / "docs" / "reliability.md").read_text().split())
    assert figures["inputs"] >= 10_000
    said = f"Of {figures['inputs']:,} (a sixth of each kind) {figures['read']:,} were valid, "
    said += f"{figures['refused in one line']:,} were refused in one line, and "
    assert f"{said}{figures['tracebacks']} ended in a traceback" in page


@pytest.mark.parametrize("package", ["trainer", "launch"])
def test_every_file_has_its_place_on_the_map(package: str) -> None:
    page = (ROOT / "docs" / "how_it_works.md").read_text()
    table = page.split(f"| `{package}/` |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (?:`(\w+)/`)? ?\|[^|]*\|([^|]*)\|$", table, re.MULTILINE)
    placed = {f"{room}/{name}" for room, row in rows for name in re.findall(r"`([\w.]+)`", row)}
    here = set()
    for path in (ROOT / package).rglob("*"):
        name = path.stem if path.suffix == ".py" else path.name
        room = "" if path.parent == ROOT / package else path.parent.name
        if path.suffix in (".py", ".cc", ".h") and (name != "__init__" or not room):
            here.add(f"{room}/{name}")
    assert placed == here


def test_batch_norm_can_be_taken_out_of_the_project(tmp_path: Path) -> None:
    """With the files that its page names, and no other."""
    page = (ROOT / "docs" / "batch_norm.md").read_text()
    (named,) = re.findall(r"depends\non nothing else of this project but (.*?)\.\n\n", page, re.S)
    taken = tmp_path / "taken"
    taken.mkdir()
    for name in ["batch_norm/", *re.findall(r"`trainer/(.*?)`", named)]:
        copy = shutil.copytree if name.endswith("/") else shutil.copy
        copy(ROOT / "trainer" / name, taken / name)
    code = (
        "import mxnet as mx; from taken.batch_norm import SyncBatchNorm; "
        "from taken.batch_norm.running_statistics import calibrate; "
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

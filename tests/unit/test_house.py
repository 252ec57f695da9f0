"""The house rules: files, functions and folders stay small enough to be read at once."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("trainer", "launch")
MODULES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))

MODULE_LINES, FUNCTION_LINES, FOLDER_MODULES = 300, 60, 12
# 17,000 lines were agreed for trainer/ and launch/, C++ and all. There are more, which is a debt,
# and security, disks and GPUs have added to it (20,650 before): it has to fall.
ALL_LINES = 22_873

# It runs before anything is installed, by itself: all of it is one file.
EXCEPTED = "launch/install.py"


def functions(text: str) -> Iterator[Tuple[str, int]]:
    """(name, number of lines) of each."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, 1 + (node.end_lineno or node.lineno) - node.lineno


def too_long(text: str) -> List[str]:
    """What is too long in a module."""
    lines = len(text.splitlines())
    found = [f"{lines} lines"] if lines > MODULE_LINES else []
    return found + [f"{name}: {n} lines" for name, n in functions(text) if n > FUNCTION_LINES]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_are_short(module: Path) -> None:
    found = too_long(module.read_text(encoding="utf-8"))
    if str(module.relative_to(ROOT)) == EXCEPTED:
        found = [what for what in found if ":" in what]
    assert not found


def test_what_is_too_long_would_be_found() -> None:
    long = "def f():\n" + "    pass\n" * FUNCTION_LINES
    assert too_long(long) == ["f: 61 lines"]
    assert too_long("\n" * 301) == ["301 lines"]


def test_folders_hold_few_modules() -> None:
    rooms: Dict[Path, List[str]] = {}
    for module in MODULES:
        if module.name != "__init__.py":
            rooms.setdefault(module.parent, []).append(module.name)
    assert len(rooms) > 12
    full = {str(room): names for room, names in rooms.items() if len(names) > FOLDER_MODULES}
    assert not full


def test_the_whole_does_not_grow() -> None:
    suffixes = (".py", ".cc", ".h")
    files = [p for name in PACKAGES for p in (ROOT / name).rglob("*") if p.suffix in suffixes]
    assert sum(len(p.read_text(encoding="utf-8").splitlines()) for p in files) <= ALL_LINES

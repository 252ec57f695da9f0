"""Every command line in README and docs is accepted by its parser."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from typing import List

import click
import pytest

from launch import __main__ as launcher
from tests.documents import DOCUMENTS, PROGRAMS, ROOT, blocks, mentioned, typed
from trainer import config
from trainer.cli.main import main

EACH_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
PLACEHOLDER = re.compile(r"\.\.\.|[A-Z]{2,}")  # `train ...`, CONFIG, INPUT...
VARIABLE = re.compile(r"[A-Z_]+=\S*")


SCRIPTS = {"gluon-train": "trainer", "gluon-launch": "launch"}


def check(line: str) -> None:
    """Fail where the line names a command, option, setting or file that is not there."""
    words = shlex.split(line.replace("[", " ").replace("]", " "))
    while words and VARIABLE.fullmatch(words[0]):
        words = words[1:]
    program = words[0].rsplit("/", 1)[-1]
    if program == "python":
        assert words[1] == "-m", line
        _check_module(words[2], words[3:])
    elif program in SCRIPTS:
        _check_module(SCRIPTS[program], words[1:])
    elif program == "make":
        _check_make(words[1:])
    elif program in ("pip", "source"):
        for word in words[1:]:
            assert not word.endswith(".txt") or (ROOT / word).is_file(), line
    else:  # what horovodrun, srun, mpirun, docker and apptainer start
        started = [at for at, word in enumerate(words) if word in ("python", *SCRIPTS)]
        if started:
            check(shlex.join(words[started[0] :]))
    assert program in PROGRAMS, f"{line}: nobody knows {program}"


def _check_module(module: str, words: List[str]) -> None:
    if module == "trainer":
        _check_trainer(words)
    elif module == "launch":
        _check_launch(words)
    else:
        found = importlib.util.find_spec(module)
        assert found is not None and found.origin is not None, module
        source = Path(found.origin).read_text()
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in source, f"{module} {word}"


def _check_trainer(words: List[str]) -> None:
    name, *arguments = words
    if PLACEHOLDER.fullmatch(name):
        return
    assert name in main.commands, f"trainer has no command {name}"
    if arguments == ["..."]:
        return
    context = main.commands[name].make_context(name, list(arguments))  # as click itself reads them
    given = [word for value in context.params.values() for word in _words(value)]
    settings = [w for w in given if re.match(r"[a-z_.]+=", w) and not PLACEHOLDER.search(w)]
    config.from_dict({}, settings)
    file = context.params.get("config")
    if file and "=" not in file and not PLACEHOLDER.search(file) and "/" not in file:
        config.load(file)
    for word in given:
        assert not word.startswith("configs/") or (ROOT / word).is_file(), word


def _words(value: object) -> List[str]:
    return [w for w in (value if isinstance(value, tuple) else (value,)) if isinstance(w, str)]


def _check_launch(words: List[str]) -> None:
    options, command = launcher._split_command(words)
    options = [word for word in options if word != "..."]
    if options and not (options[1:] == [] and "--" not in words):  # `launch local` in a sentence
        launcher._parser().parse_args(options)
    if command:
        check(shlex.join(command))


def _check_make(words: List[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        if "=" in word:
            assert re.search(
                rf"\$\({word.split('=')[0]}\)|\$\(if \$\({word.split('=')[0]}\)", makefile
            )
        else:
            assert re.search(rf"^{word}:", makefile, re.MULTILINE), f"make {word}"


@EACH_DOCUMENT
def test_every_command_would_be_understood(document: Path) -> None:
    for line in mentioned(document):
        try:
            check(line)
        except (click.ClickException, SystemExit, ValueError) as error:
            pytest.fail(f"{line}: {error}")


@EACH_DOCUMENT
def test_python_in_the_documents_compiles_and_imports_what_there_is(document: Path) -> None:
    for block in blocks(document):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.split(".")[0] in ("trainer", "launch"):
                exec(ast.get_source_segment(block.text, node), {})


@pytest.mark.parametrize(
    "line",
    [
        "python -m trainer trane configs/quickstart.yaml",
        "python -m trainer train configs/quikstart.yaml",
        "python -m trainer train configs/quickstart.yaml optimizer.rate=1",
        "python -m trainer train configs/quickstart.yaml optimizer.lr=-1",
        "python -m trainer predict runs/quickstart",
        "python -m trainer bench configs/quickstart.yaml --sweep optimizer.lr=1,2",
        "python -m trainer export runs/quickstart --folder there",
        "python -m launch local -np 2 -- python -m trainer train",
        "python -m launch local -n 2 -- python -m trainer train --again",
        "python -m launch here -n 2 -- python -m trainer train",
        "horovodrun -np 2 python -m trainer trane",
        "srun --label python -m launch slurm-rank --late -- python -m trainer train",
        "python -m benchmarks.nothing",
        "python -m benchmarks.batch_norm --sideways",
        "gluon-launch local -n 2 -- gluon-train trane quickstart",
        "gluon-train train quikstart",
        "docker run IMAGE gluon-train trane quickstart",
        "make training",
        "make train RANK=2",
        "pip install -r requirements-none.txt",
    ],
)
def test_a_wrong_command_would_be_found(line: str) -> None:
    with pytest.raises((AssertionError, click.ClickException, SystemExit, ValueError)):
        check(line)


def test_commands_are_found_in_the_documents() -> None:
    lines = typed(ROOT / "README.md")
    assert "make train" in lines and "make test" in lines
    assert sum(line.startswith("python -m trainer") for line in lines) >= 5
    folded = typed(ROOT / "docs" / "launch.md")
    assert any("--partition gpu -- python -m trainer train" in line for line in folded)

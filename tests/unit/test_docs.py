"""What the documents say is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from trainer import config, settings_table
from trainer.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_configuration_page_is_what_the_settings_say() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == settings_table.as_markdown(), "python -m trainer.settings_table > docs/..."


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_trainer_commands_parse(document: Path) -> None:
    """Each `python -m trainer` line names a command, options and settings that exist."""
    for line in re.findall(r"python -m trainer (.+)", document.read_text()):
        words = line.split("#")[0].replace("`", " ").split()
        name, words = words[0], words[1:]
        if name not in main.commands:
            assert not re.fullmatch(r"[a-z]+", name), f"no command {name}"
            continue
        options = {o for p in main.commands[name].params for o in p.opts if o.startswith("--")}
        for word in words:
            if word.startswith("--"):
                assert word in options, line
            elif re.fullmatch(r"[a-z_.]+=\S+", word):
                assert word.split("=")[0] in config.all_settings(), line
            elif word.endswith(".yaml") and word.startswith("configs/"):
                assert (ROOT / word).is_file(), line


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_help_names_every_command() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output
    for name in ("train", "evaluate", "calibrate", "summary", "config"):
        assert name in shown

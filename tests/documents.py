"""Extracts commands and code from README and docs."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Iterator, List, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS.append(ROOT / "SECURITY.md")

# The first words of command lines.
PROGRAMS = (
    "apptainer",
    "apt-get",
    "docker",
    "gluon-launch",
    "gluon-train",
    "horovodrun",
    "jupyter",
    "make",
    "mpirun",
    "pip",
    "python",
    "source",
    "srun",
    "tensorboard",
)
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
_INLINE = re.compile(r"`([^`\n]+)`")


class Block(NamedTuple):
    """A fenced block; indented ones have no language."""

    language: str
    text: str


def blocks(document: Path) -> List[Block]:
    """The code of a document: its fenced blocks, then its indented ones."""
    text = document.read_text(encoding="utf-8")
    found = [Block(*match.groups()) for match in _FENCED.finditer(text)]
    rest = _FENCED.sub("", text)
    return found + [Block("", textwrap.dedent(m.group())) for m in _INDENTED.finditer(rest)]


def typed(document: Path) -> List[str]:
    """The lines of the document's blocks of commands, each whole and without its comment.

    A block is one of commands when its first line is; output and job scripts are not.
    """
    return [line for block in blocks(document) for line in _typed(block)]


def mentioned(document: Path) -> List[str]:
    """All command lines: typed ones, and those within the text."""
    text = _FENCED.sub("", document.read_text(encoding="utf-8"))
    return typed(document) + [span for span in _INLINE.findall(text) if _is_command(span)]


def _typed(block: Block) -> Iterator[str]:
    joined = re.sub(r"\s*\\\n\s*", " ", block.text)
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines()]
    if block.language in ("", "bash", "sh") and lines and _is_command(lines[0]):
        yield from filter(None, lines)


def _is_command(line: str) -> bool:
    first, _, rest = line.partition(" ")
    return bool(rest) and first.rsplit("/", 1)[-1] in PROGRAMS

"""What is printed controls no terminal, whatever names it holds."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from launch.core.process import say
from launch.core.streams import one_line, print_line, printable
from trainer import console
from trainer.report.progress import Display

# Sets the window's title, hides what follows (also as a byte), and turns the direction of the text.
HOSTILE = "\x1b]0;owned\x07a\x9b8m\udc9b8m\u202eb\rc"
SHOWN = "\\x1b]0;owned\\x07a\\x9b8m\\udc9b8m\\u202eb\\rc"


def test_controls_are_escaped_and_lines_and_languages_stay() -> None:
    assert printable(f"{HOSTILE}\n\t中文 é") == f"{SHOWN}\n\t中文 é"
    assert one_line("a\nb") == "a\\nb"


def test_every_line_for_people_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(HOSTILE)
    say(HOSTILE)
    console.warn(f"{HOSTILE}\nsecond")
    told = capsys.readouterr()
    assert told.out == f"{SHOWN}\n"
    assert told.err == f"launch: {SHOWN}\nwarning: {SHOWN}\\nsecond\n"


def test_the_output_of_ranks_is_passed_on_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_line("\x1b[31mred", raw=True)
    assert capsys.readouterr().out == "\x1b[31mred\n"


def test_what_the_streams_encoding_lacks_is_escaped() -> None:
    """A name in Chinese must end no job that was started over a Latin-1 ssh."""
    latin = io.TextIOWrapper(io.BytesIO(), "latin-1")
    print_line("é 中 \ufffd \udcff", latin, raw=True)
    assert latin.buffer.getvalue() == b"\xe9 \\u4e2d \\ufffd \\udcff\n"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_so_are_lines_above_a_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    display = Display("text", 0, 10, stream)
    display.line(HOSTILE)
    display.close()
    assert "\x1b[" in stream.getvalue() and "\x1b]" not in stream.getvalue()
    assert SHOWN in stream.getvalue()


ANSWER = (
    "import sys; from launch.core import streams; "
    "streams.run(lambda: streams.answer(sys.argv[1]) or 0)"
)


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_is_escaped_for_a_terminal_alone(terminal: bool) -> None:
    """A file or a program gets names as they are."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    name = HOSTILE.replace("\r", "")
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    root = Path(__file__).parents[4]
    command = [sys.executable, "-c", ANSWER, name]
    subprocess.run(command, stdout=writer, env=env, cwd=root, check=True)
    os.close(writer)
    shown = os.fsdecode(os.read(reader, 1000)).strip()
    os.close(reader)
    assert shown == (SHOWN.replace("\\r", "") if terminal else name)

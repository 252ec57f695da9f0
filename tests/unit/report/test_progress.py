"""Plain lines in files and pipes, a live bar on a terminal."""

from __future__ import annotations

import datetime
import io
import json
import os
import pty
import shlex
import subprocess
import sys
import time

import pytest

from trainer.report import wording
from trainer.report.progress import Display


def lines(stream: io.StringIO) -> list:
    return stream.getvalue().splitlines()


def test_pipe_gets_a_line_at_each_reading_and_none_at_a_step():
    stream = io.StringIO()
    display = Display("text", 0, 40, stream)
    for step in range(1, 41):
        display.step(step)
        if step % 20 == 0:
            display.figures(step, f"loss {step / 100:.4f}")
    display.line("epoch 1: done")
    display.close()
    first, second, third = lines(stream)
    assert first.startswith("[==========          ] 20/40 loss 0.2000") and "left" in first
    assert second == "[====================] 40/40 loss 0.4000"
    assert third == "epoch 1: done"
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


@pytest.mark.parametrize(
    "seconds, expected",
    [(10, "0:10"), (59.7, "1:00"), (60, "1:00"), (119.6, "2:00"), (90.4, "1:30"), (7322, "122:02")],
)
def test_remaining_time_is_read_as_minutes_and_seconds(monkeypatch, seconds, expected):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    display = Display("text", 0, 20, stream)
    now[0] = float(seconds)
    display.figures(10, "")  # half is done, so as long again
    assert lines(stream)[0].endswith(f"  {expected} left")


def test_resumed_run_reckons_with_the_steps_it_made_itself(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    display = Display("text", 90, 100, stream)
    now[0] = 10.0
    display.figures(95, "x")
    assert lines(stream) == ["[=================== ] 95/100 x  0:10 left"]


def test_first_line_of_a_resumed_run_guesses_nothing():
    stream = io.StringIO()
    Display("text", 90, 100, stream).figures(90, "x")
    assert lines(stream) == ["[==================  ] 90/100 x"]


def test_lines_are_flushed_at_once():
    class Stream(io.StringIO):
        flushed = 0

        def flush(self):
            self.flushed += 1

    stream = Stream()
    display = Display("text", 0, 2, stream)
    display.figures(1, "x")
    display.line("y")
    assert stream.flushed == 2


FIGURES = "epoch 19/20  loss 0.1234  accuracy 0.9123  12345 images/s"
LINE = (
    "a [red]line[/red] with brackets [0.5], a name 中文, that goes on for more than sixty columns"
)


def on_terminal(encoding: str) -> str:
    """What a terminal is sent of a run of 9380 steps."""
    main, terminal = pty.openpty()
    with os.fdopen(terminal, "w", encoding=encoding) as stream:
        display = Display("text", 0, 9380, stream, ranks=16)
        for step in range(1, 9381):
            display.step(step)
        display.figures(9380, FIGURES)
        display.line(LINE)
        display.close()
        stream.flush()
        shown = b""
        os.set_blocking(main, False)
        while True:
            try:
                shown += os.read(main, 65536)
            except OSError:
                break
    os.close(main)
    return shown.decode(encoding).replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [60, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_terminal_gets_a_live_bar_and_lines_that_stay(monkeypatch, columns, encoding):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    text = on_terminal(encoding)
    assert "16 ranks" in text and "9380/9380" in text and FIGURES in text, "nothing is cut off"
    assert LINE.encode(encoding, "backslashreplace").decode(encoding) in text, "in one piece"
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back


def test_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert on_terminal("utf-8") == f"[====================] 9380/9380 {FIGURES}\n{LINE}\n"


def test_json_is_one_object_a_line_and_strict():
    stream = io.StringIO()
    display = Display("json", 0, 40, stream)
    display.step(1)
    display.show("step", {"step": 20, "loss": float("nan"), "accuracy": 0.5})
    display.show("checkpoint", {"step": 20, "path": "runs/a"})
    display.close()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines(stream))
    assert (first["event"], first["step"], first["loss"]) == ("step", 20, None)
    assert first["seconds_left"] >= 0 and datetime.datetime.fromisoformat(first["time"]).tzinfo
    assert (second["event"], second["path"]) == ("checkpoint", "runs/a")


def test_in_words_a_checkpoint_is_not_worth_a_line():
    stream = io.StringIO()
    Display("text", 0, 40, stream).show("checkpoint", {"step": 20, "path": "runs/a"})
    assert stream.getvalue() == ""


END = {
    "state": "done",
    "step": 40,
    "last_step": 40,
    "accuracy": 0.8,
    "best_accuracy": 0.9,
    "set": "test",
    "seconds": 125.4,
    "images_per_second": 99.6,
    "checkpoint": "runs/a/step-40",
    "best_checkpoint": "runs/a/step-20",
    "events": None,
    "next": {"resume": "type this"},
}


def test_the_end_says_how_well_how_long_where_and_what_next():
    assert wording.text("end", END).splitlines() == [
        "done: test accuracy 0.8000 (best 0.9000, chosen on the test set), 2:05 minutes, "
        "100 images/s",
        "checkpoint: runs/a/step-20",
        "resume:     type this",
    ]


def test_the_end_of_a_run_that_was_validated_says_what_the_test_set_says():
    first, *_ = wording.text("end", {**END, "set": "validation", "test_accuracy": 0.7}).splitlines()
    assert first.startswith("done: validation accuracy 0.8000 (best 0.9000), test accuracy 0.7000,")


def test_the_end_of_a_run_without_a_test_set_claims_nothing():
    nothing = dict.fromkeys(("accuracy", "best_accuracy", "set"))
    first, *_ = wording.text("end", {**END, **nothing}).splitlines()
    assert first == "done: 2:05 minutes, 100 images/s"


def test_a_run_that_stopped_early_says_where_and_why():
    first, *_ = wording.text("end", {**END, "state": "stopped early", "step": 20}).splitlines()
    assert first.startswith("stopped early at step 20 of 40 (train.patience): test accuracy 0.8000")


def test_a_run_that_was_stopped_says_where():
    nothing = dict.fromkeys(("accuracy", "best_accuracy", "images_per_second", "best_checkpoint"))
    first, *_ = wording.text("end", {**END, **nothing, "state": "stopped", "step": 7}).splitlines()
    assert first == "stopped at step 7 of 40, as asked; saved"
    _, place, _ = wording.text("end", {**END, "state": "stopped"}).splitlines()
    assert place == "checkpoint: runs/a/step-40", "from which it goes on, not the best"


def test_a_warning_says_that_it_is_one():
    assert wording.text("warning", {"message": "no room"}) == "warning: no room"


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_number_of_a_closed_stream(tmp_path, closed):
    """What MXNet's C++ prints would go into it."""
    code = (
        "import sys; from trainer import console\n"
        "console.open_standard_streams()\n"
        f"file = open({str(tmp_path / 'numbers')!r}, 'w')\n"
        "console.print_line('dropped')\n"
        "print(file.fileno() > 2, sys.stdout.fileno(), sys.stderr.fileno(), file=file)\n"
    )
    command = f"{shlex.join([sys.executable, '-c', code])} {closed}"
    subprocess.run(["bash", "-c", command], check=True, timeout=60)
    assert (tmp_path / "numbers").read_text() == "True 1 2\n"

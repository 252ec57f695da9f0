"""Options and types of options that several actions of the command line share."""

from __future__ import annotations

import argparse
import re
from typing import Any, Callable, NoReturn

from .core.streams import USER_ERROR, print_error


class _Help(argparse.HelpFormatter):
    """As `python -m trainer --help` looks, which click makes."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        super().add_usage(usage, actions, groups, prefix or "Usage: ")

    def start_section(self, heading: Any) -> None:
        super().start_section(heading and heading.capitalize())


class Parser(argparse.ArgumentParser):
    """A parser whose help and errors look like those of `python -m trainer`."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        print_error(message)
        raise SystemExit(USER_ERROR)


def add_start_timeout(parser: argparse.ArgumentParser) -> None:
    """Add --start-timeout, in seconds."""
    add_seconds(parser, "--start-timeout", 600, "how long ranks wait for the last one to arrive")


def add_seconds(parser: Any, name: str, default: int, meaning: str) -> None:
    """Add an option that is a duration in seconds."""
    how = f"{meaning} (default {default})"
    parser.add_argument(name, type=_seconds, default=float(default), metavar="SECONDS", help=how)


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number, of `least` or more."""

    def convert(text: str) -> int:
        if not re.fullmatch("[0-9]{1,5}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to 99999")
        return int(text)

    return convert


def _seconds(text: str) -> float:
    """The type of an option that is a duration in seconds."""
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, such as 10 or 0.5")
    return float(text)

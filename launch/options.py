"""Options and types of options that several actions of the command line share."""

from __future__ import annotations

import argparse
import re


def add_start_timeout(parser: argparse.ArgumentParser) -> None:
    """Add --start-timeout, in seconds."""
    parser.add_argument(
        "--start-timeout",
        type=seconds,
        default=600.0,
        metavar="SECONDS",
        help="how long ranks wait for the last one to arrive (default 600)",
    )


def positive(text: str) -> int:
    """The type of an option that is a whole number from 1."""
    return _whole_number(text, 1)


def natural(text: str) -> int:
    """The type of an option that is a whole number from 0."""
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    if not re.fullmatch("[0-9]{1,4}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to 9999")
    return int(text)


def seconds(text: str) -> float:
    """The type of an option that is a duration in seconds."""
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, such as 10 or 0.5")
    return float(text)

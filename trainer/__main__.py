"""The command line of a rank: ``python -m trainer COMMAND``."""

from __future__ import annotations

from .console import open_standard_streams


def main() -> None:
    """Run the command line; the streams come first, before a library can open a file."""
    open_standard_streams()
    from .cli.main import run

    run()


if __name__ == "__main__":
    main()

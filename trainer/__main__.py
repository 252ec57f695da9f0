"""The command line of a rank: ``python -m trainer COMMAND``."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line; the streams come first, before a library can open a file."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # no traceback of ctrl-C in an import
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .console import open_standard_streams

    open_standard_streams()
    from .cli.main import run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()

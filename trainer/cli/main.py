"""The program ``python -m trainer``: its commands, and how it ends."""

from __future__ import annotations

import sys
import time
import traceback
from typing import Any, List, Optional

try:
    import click
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {missing}: type `make setup` in a clone and use .venv/bin/python, or "
        "`pip install` this project into your own environment (docs/install.md)"
    )
import trainer

from .. import console, dist
from ..console import USER_ERROR
from ..dist import environment
from ..dist.shared_memory import LostPeerError
from ..errors import UserError, nearest, show
from . import after, train

INSTALL_MXNET = (
    "`pip install mxnet==1.9.1 'numpy<1.24'` (on NVIDIA GPUs mxnet-cu117), or type `make setup` in "
    "a clone and use .venv/bin/python"
)

SPEAK_SECONDS = 5.0  # for rank 0 to print first: launchers end all ranks after one has ended


def _show_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        console.answer(f"gluon-horovod-trainer {trainer.__version__}")
        context.exit()


class _Commands(click.Group):
    def resolve_command(self, ctx: click.Context, args: List[str]) -> Any:
        """As click does; a word that is no command is told which there are."""
        if args[0] not in self.commands:
            meant = nearest(args[0], list(self.commands))
            there = ", ".join(self.commands)
            raise click.UsageError(f"there is no command {show(args[0])}{meant}; one of {there}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Data-parallel training of Gluon nets.

    CONFIG is a preset's name or a YAML file; SETTING=VALUE, such as train.epochs=3, goes on top:
    `train --help` lists all settings.
    """


_OF_RUNS = (train.train, train.bench, after.runs, after.compare, train.summary, train.config)
_OF_CHECKPOINTS = (after.evaluate, after.calibrate, after.average, after.predict, after.export)
for _command in (*_OF_RUNS, *_OF_CHECKPOINTS):
    main.add_command(_command)


# Messages of a rank whose peer has died: from Horovod, and from Gloo within a collective.
_LOST_PEER = ("Horovod has been shut down", "Connection reset by peer", "Connection closed by peer")
_NO_MEMORY = ("bad_alloc", "Failed to allocate CPU Memory")  # of MXNet's errors


def run() -> None:
    """Run the command line; user errors end in one line on rank 0, others name their rank."""
    console.escape_what_is_missing(sys.stdout)
    try:
        console.check_current_folder(UserError)
        main(standalone_mode=False)
    except click.ClickException as error:
        _leave(error.format_message(), USER_ERROR)
    except environment.LaunchError as error:
        _leave(str(error), USER_ERROR, alone=True)  # the rank of a process cannot be trusted
    except (UserError, dist.PeerError, dist.NotJoinedError, console.LostAnswerError) as error:
        # Most are raised on all ranks alike, see dist.together: one of them prints.
        _leave(str(error), USER_ERROR, getattr(error, "alone", False))
    except click.Abort as abort:
        saved = str(abort.__cause__ or "")  # fit's own, after the lines that say so
        _leave("" if saved else "interrupted", 130)
    except Exception as error:
        if isinstance(error, PermissionError) and error.filename is not None:
            said = f"{error.filename} may not be read, or not written, by this user"
            _leave(said, USER_ERROR, alone=True)
        if isinstance(error, ModuleNotFoundError) and error.name == "mxnet":
            _leave(f"{error}: {INSTALL_MXNET}", USER_ERROR)
        from ..run.outcome import TrainingError

        if isinstance(error, TrainingError):
            _leave(str(error), USER_ERROR)
        where = environment.where()
        if _lost_a_rank(error):
            said = f"{where}: another rank has ended or hangs; its own message gives the cause"
        elif isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
            said = f"{where}: memory ran out; lower train.global_batch_size, or start fewer ranks"
        else:
            said = f"{traceback.format_exc()}{where} failed: {type(error).__name__}: {error}"
        console.print_line(said, sys.stderr)
        console.leave(1)  # not sys.exit: MXNet's engine would wait for collectives without end


def _lost_a_rank(error: Exception) -> bool:
    """Whether ``error`` came of a rank that will never call."""
    if any(words in str(error) for words in _LOST_PEER):
        return True
    cause: Optional[BaseException] = error
    while cause is not None:
        if isinstance(cause, LostPeerError):
            return True
        cause = cause.__context__
    if "mxnet" not in sys.modules:  # it may not even be installed
        return False
    from ..batch_norm.rank_sum import registry

    return registry.lost is not None


def _leave(message: str, code: int, alone: bool = False) -> None:
    if not alone and environment.rank() != 0:
        time.sleep(SPEAK_SECONDS)
    elif message:
        console.print_error(message)
    console.leave(code)

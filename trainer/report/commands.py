"""Commands that the user may want after a run, as they can be pasted into the same shell."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from ..config import Config
from ..dist import environment

_BETTER = {"quickstart": "fashion_mnist"}  # presets on the same images
_PLACES = ("output=", "data.folder=", "device=")
_MAKES = "configs/quickstart.yaml", 2  # the Makefile's CONFIG and RANKS


def next_commands(config: Config, state: str) -> Dict[str, str]:
    """Commands by purpose, for a run that ended in ``state``."""
    given = _own_words()
    # These would begin the run anew, or repeat it from an older checkpoint.
    again = [
        word
        for before, word in zip(["", *given], given)
        if before != "--resume" and not re.match("--(resume(=|$)|force$)", word)
    ]
    same = "the same command" + " without --resume and --force," * (again != given)
    view = f"{typed('tensorboard')} --logdir {shlex.quote(config.output)}"
    commands = {"view": view} if "tensorboard" in config.monitor.loggers else {}
    if state == "stopped":
        commands["resume"] = _again(again) or same.rstrip(",")
        return commands
    if state == "stopped early":
        longer = "train.patience=null"
        commands["continue"] = _again([*again, longer] * bool(again)) or f"{same} with {longer}"
    output = [] if config.output == Config().output else [config.output]
    commands["list runs"] = " ".join([_program(), shlex.join(["runs", *output])])
    better = _better(again) if config.data.dataset == "fashion_mnist" else None
    return {**commands, "higher accuracy": better} if better else commands


def typed(name: str) -> str:
    """A program of this Python's environment as it can be typed in the current folder."""
    own = Path(sys.executable).with_name(name)
    # Launchers put the environment's own programs first in the PATH of ranks.
    path = os.environ.get("LAUNCH_PATH", os.environ.get("PATH"))
    found = shutil.which(name, path=path)
    if found == str(own) or (found and not own.exists()):  # elsewhere: pip install --user, Colab
        return name
    here = own.relative_to(Path.cwd()) if Path.cwd() in own.parents else own
    return shlex.quote(str(here))


def _program() -> str:
    if Path(sys.argv[0]).name == "gluon-train":
        return typed("gluon-train")
    return f"{typed(Path(sys.executable).name)} -m trainer"


def _own_words() -> List[str]:
    """What follows ``train`` on the command line; empty in a program of the user's own."""
    program = Path(sys.argv[0])
    ours = program.name == "gluon-train" or program.parts[-2:] == ("trainer", "__main__.py")
    return sys.argv[2:] if ours and sys.argv[1:2] == ["train"] else []


def _better(words: Sequence[str]) -> Optional[str]:
    """The command on the preset that is more accurate than the one in ``words``."""
    preset = Path(words[0]) if words else Path()
    better = _BETTER.get(preset.stem)
    places = [word for word in words[1:] if word.startswith(_PLACES)]
    return _again([str(preset.with_name(better + preset.suffix)), *places]) if better else None


def _again(words: Sequence[str]) -> Optional[str]:
    """The command that trains with ``words``, started as this one was; None if that is unknown."""
    by, ranks = os.environ.get("LAUNCHED_BY"), environment.size()
    if not words:
        return None
    if by == "make":
        config, *rest = words
        given = [f"CONFIG={config}"] * (config != _MAKES[0])
        given += [f"RANKS={ranks}"] * (ranks != _MAKES[1])
        given += [f"ARGS={shlex.join(rest)}".replace("$", "$$")] * bool(rest)
        return shlex.join(["make", "train", *given])
    train = f"{_program()} {shlex.join(['train', *words])}"
    if by is not None:
        return f"{typed(Path(sys.executable).name)} -m launch {by} {train}"
    if environment.launch_id() is not None:  # of Slurm, whose job script is not known here
        return None
    if ranks == 1:
        return train
    alone = environment.local_size() == ranks and "HOROVOD_SIZE" in os.environ
    return f"{typed('horovodrun')} -np {ranks} {train}" if alone else None

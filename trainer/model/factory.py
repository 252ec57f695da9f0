"""Any net by the dotted path of the function that makes it: ``model.factory``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Optional

from mxnet.gluon import Block

from ..config import Model
from ..data import randomness
from ..errors import ConfigError, describe_error, nearest

OWN = Model().factory


@randomness.kept()
def build(settings: Model, found_in: Optional[Path] = None, seed: int = 0) -> Block:
    """The net that ``model.factory`` and ``model.arguments`` describe, as the function makes it.

    What that draws at random goes by ``seed``: alike on all ranks, and in a run that resumes.

    ``found_in`` is the file or folder that names the function, unless the user does; anybody may
    have made that, and of what it names only the project's own net is run. Raises ConfigError: the
    module or function is not there, refuses the arguments, fails, or gives no Gluon Block.
    """
    if found_in is not None and settings.factory != OWN:
        raise ConfigError(
            f"{found_in} has its net made by {settings.factory}, which may be any code; if you "
            f"trust it, name it yourself by model.factory={settings.factory}, or add --trust (in "
            "Python trust=True)"
        )
    module_name, function_name = settings.factory.split(":")
    if os.getcwd() not in sys.path:  # the user's own modules are in the current folder
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"model.factory is {settings.factory}; {module_name} cannot be imported from "
            f"{os.getcwd()} or PYTHONPATH: {describe_error(error)}"
        ) from error
    factory = getattr(module, function_name, None)
    if isinstance(factory, Block):
        raise ConfigError(
            f"model.factory is {settings.factory}, which is a net; name a function that makes it"
        )
    if not callable(factory):
        raise ConfigError(
            f"model.factory is {settings.factory}; {module_name} has no such function"
            f"{nearest(function_name, dir(module))}"
        )
    randomness.seed_all(seed)
    try:
        net = factory(**settings.arguments)
    except ConfigError:
        raise
    except Exception as error:
        given = f"; model.arguments are {settings.arguments}" if settings.arguments else ""
        raise ConfigError(
            f"model.factory {settings.factory} failed: {describe_error(error)}{given}"
        ) from error
    if not isinstance(net, Block):
        raise ConfigError(
            f"model.factory {settings.factory} returned a {type(net).__name__}, not a Gluon Block"
        )
    return net

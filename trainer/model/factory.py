"""Any net by the dotted path of the function that makes it: ``model.factory``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any, Callable

from mxnet.gluon import Block

from ..config import Model
from ..errors import ConfigError, describe_error, nearest


def build(settings: Model) -> Block:
    """The net that ``model.factory`` and ``model.arguments`` describe, not yet initialised.

    Raises:
        ConfigError: the module or function is not there, refuses the arguments, fails, or
            returns something other than a Gluon Block.
    """
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
    _check_arguments(settings, factory)
    try:
        net = factory(**settings.arguments)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"model.factory {settings.factory} failed: {describe_error(error)}"
        ) from error
    if not isinstance(net, Block):
        raise ConfigError(
            f"model.factory {settings.factory} returned a {type(net).__name__}, not a Gluon Block"
        )
    return net


def _check_arguments(settings: Model, factory: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # a builtin without a signature
        return
    try:
        signature.bind(**settings.arguments)
    except TypeError as error:
        raise ConfigError(
            f"model.arguments {settings.arguments} do not fit {settings.factory}{signature}: "
            f"{error}"
        ) from error

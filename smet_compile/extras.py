"""Imports the libraries of the `pretrain` extra when they are first needed."""

from importlib import import_module
from types import ModuleType


class MissingExtraError(ModuleNotFoundError):
    """Says that a library of the `pretrain` extra is not installed, and how to install it."""


def require(name: str) -> ModuleType:
    """Imports module `name`, or raises `MissingExtraError` with the command that installs it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"{name} is needed for this but not installed; run: pip install 'smet-compile[pretrain]'"
        ) from error

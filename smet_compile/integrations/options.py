"""Sorts the options that an integration takes by the functions of the library that know them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any


def split_options(
    options: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]], given: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Returns for each function, by its name, the options that it takes; one that several take goes to all of them.

    Args:
        given: the arguments that the integration itself passes, which are no options.

    Raises:
        ValueError: an option that none of the functions takes.
    """
    known = {name: _parameters(function) - set(given) for name, function in functions.items()}
    unknown = sorted(set(options) - set().union(*known.values()))
    if unknown:
        raise ValueError(
            f"{unknown[0]}: expected an option of {' or '.join(known)}, got another name; known are "
            f"{', '.join(sorted(set().union(*known.values())))}"
        )
    return {name: {key: value for key, value in options.items() if key in known[name]} for name in known}


def _parameters(function: Callable[..., Any]) -> set[str]:
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {name for name, each in inspect.signature(function).parameters.items() if each.kind in kinds}

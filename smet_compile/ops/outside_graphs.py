"""outside_graphs: functions that torch.compile does not trace. Importing this imports no compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
_not_prepared: list[Callable[[], Any]] = []


def outside_graphs(advice: str) -> Callable[[Function], Function]:
    """Marks a function as one that a compiled function calls in eager mode, between two graphs.

    Args:
        advice: what the error says where no graph may end (``fullgraph=True``).
    """

    def mark(function: Function) -> Function:
        untraced: list[Callable[..., Any]] = []

        def disable() -> None:
            if not untraced:
                untraced.append(torch.compiler.disable(function, reason=advice))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not untraced:
                disable()
            return untraced[0](*args, **kwargs)

        _not_prepared.append(disable)
        return call  # type: ignore[return-value]

    return mark


def prepare() -> None:
    """Imports the compiler, as making any optimizer does, so that a call that is traced first finds all in place."""
    while _not_prepared:
        _not_prepared.pop()()

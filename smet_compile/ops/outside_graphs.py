"""outside_graphs: methods that torch.compile does not trace. Importing this imports no compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


def outside_graphs(advice: str) -> Callable[[Method], Method]:
    """Marks a function as one that a compiled function calls in eager mode, between two graphs.

    Args:
        advice: what the error says where no graph may end (``fullgraph=True``).
    """

    def mark(function: Method) -> Method:
        disabled: list[Callable[..., Any]] = []

        def prepare() -> None:
            """Imports the compiler, as making any optimizer does; the first call may come from a traced function."""
            if not disabled:
                disabled.append(torch.compiler.disable(function, reason=advice))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not disabled:
                prepare()
            return disabled[0](*args, **kwargs)

        call.prepare = prepare  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return mark

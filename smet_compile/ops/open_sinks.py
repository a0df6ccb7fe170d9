"""Opens the update sinks of a fused step for its forward, and closes them.

A sink is open while it is an attribute of its weight (a ``CompactWeight``), where each read of the weight finds it.

Dynamo traces a region of ``torch.compiler.nested_compile_region`` once, and uses it again for other modules that had
the same attributes before the call. No sink was there then, so it cannot tell whose sinks a region takes. It traces a
region anew where that reads a variable of an enclosing function which the call has changed. Every read looks at one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

Sink = tuple[Tensor, Tensor, Tensor]
"""A parameter, what its reads take, which needs no gradient, and their sink."""


def _make_variable() -> tuple[Callable[[bool], None], Callable[[], bool]]:
    """Returns what changes a variable of this function, and what reads it."""
    variable = False

    def change(value: bool) -> None:
        nonlocal variable
        variable = value

    def read() -> bool:
        return variable

    return change, read


_set_in_step, _is_in_step = _make_variable()


def open_sinks(to_open: Iterable[tuple[Any, Any, tuple[Any, ...]]]) -> list[Sink]:
    """Opens sinks and returns them. Each is given as a weight, the op that makes its sink, and the op's arguments."""
    _set_in_step(True)
    opened = []
    for compact, make_sink, inputs in to_open:
        parameter, values = inputs[:2]
        compact.update_sink = parameter, values, make_sink(*inputs)
        opened.append(compact.update_sink)
    return opened


def close_sinks(weights: Iterable[Any]) -> None:
    """Closes the sinks of all these weights."""
    for compact in weights:
        compact.update_sink = None
    _set_in_step(False)


def sink_of(compact: Any) -> Sink | None:
    """Returns the open sink of a weight; None where it has none."""
    return compact.update_sink if _is_in_step() else None

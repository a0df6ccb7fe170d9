"""Runs a model of many equal layers by models of one and of two of them, and says what became of its own errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from smet_compile.plan import Repeats, shortened
from smet_compile.planner.shapes import SeveralGraphsError

Run = TypeVar("Run")


def run_each(
    model: nn.Module, repeats: list[Repeats], run: Callable[[nn.Module], Run], name: str
) -> list[tuple[int, Run]]:
    """``run`` of models with fewer layers, of which the whole is the weighted sum; of the whole without repeats.

    Raises ValueError, naming the model by ``name``, for what its own code raises.
    """
    if not repeats:
        return [(1, _explained(model, run, name))]
    fewest = 1 - sum(repeat.extra for repeat in repeats), _explained(shortened(model, repeats), run, name)
    return [fewest, *((each.extra, _explained(shortened(model, repeats, each), run, name)) for each in repeats)]


def _explained(model: nn.Module, run: Callable[[nn.Module], Run], name: str) -> Run:
    try:
        return run(model)
    except SeveralGraphsError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model: {name} cannot be run on shapes alone: {reason}; see inputs= and loss_fn=") from error


def stand_in(parameter: str, repeats: list[Repeats]) -> str:
    """The name of the same parameter in the layer that stands for its own."""
    for repeat in repeats:
        prefix = repeat.name + "."
        if parameter.startswith(prefix):
            number, _, rest = parameter.removeprefix(prefix).partition(".")
            return f"{prefix}{min(int(number), repeat.kept - 1)}.{rest}"
    return parameter

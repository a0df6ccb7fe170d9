"""Wish: what a user asks ``plan`` for, but for density and batch, which may be solved for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from smet_compile.convert import choose
from smet_compile.convert.choose import Choice
from smet_compile.planner.shapes import Step


@dataclass(frozen=True)
class Wish:
    """The arguments of ``plan``, checked.

    Args:
        name: of the model. model: on the meta device, dense or compact; never changed.
        selection: the other arguments of ``sparsify`` that decide which weights are chosen.
    """

    name: str
    model: nn.Module
    step: Step
    block_shape: Any
    sequence: int | None
    state_dtype: Any
    compiled: bool
    fused: bool
    selection: dict[str, Any]

    def choices(self, model: nn.Module, density: float) -> list[Choice]:
        """What ``sparsify`` makes compact of the dense ``model``."""
        return choose(model, density, self.block_shape, **self.selection).choices

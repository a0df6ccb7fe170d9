"""How each weight lies in the whole model: what comes to it, what is read of it, what of it is on a live path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smet_compile.microscope import reach
from smet_compile.microscope.dead import DeadUnits
from smet_compile.microscope.flow import Flow
from smet_compile.microscope.matrices import ActiveMatrix
from smet_compile.microscope.reading import Reading


@dataclass(frozen=True)
class Reach:
    """How one weight lies in the whole model.

    Args:
        starved: (S C,) bool: inputs with active weights to which nothing comes that depends on the model's input.
        unread: (S R,) bool: outputs with active weights of which nothing arrives at the model's output.
        num_live_weights: active weights on a path from input to output all of which is active.
    """

    starved: Tensor
    unread: Tensor
    num_live_weights: int


def sites_in(
    reading: Reading, matrices: dict[str, ActiveMatrix], dead: dict[str, DeadUnits]
) -> tuple[dict[str, Reach], float | None]:
    """Of each site that the forward uses; and log10 of the share of paths alive."""
    flow = reading.flow
    whole = {name: ActiveMatrix(layout) for name, layout in reading.weights.items()}
    real = whole | matrices
    states, dense = reach.states(flow, real), reach.states(flow, whole)
    is_read = reach.read(flow, real, states)
    found = {name: _of_site(name, flow, real[name], dead[name], states, is_read) for name in matrices}
    possible = reach.paths(flow, whole, dense).log10
    share = reach.paths(flow, real, states).log10 - possible if possible > float("-inf") else None
    return {name: one for name, one in found.items() if one is not None}, share


def _of_site(
    name: str, flow: Flow, matrix: ActiveMatrix, dead: DeadUnits, states: list[Tensor], is_read: list[Tensor]
) -> Reach | None:
    """A weight may be used several times: a unit lives where one of the uses has it live."""
    uses = [(came, went, node.transposed) for came, went, node in flow.uses if node.weight == name]
    if not uses:
        return None
    fed, wanted, sides = torch.zeros_like(dead.inputs), torch.zeros_like(dead.outputs), []
    for came, went, transposed in uses:
        live, sought = states[came] == reach.LIVE, is_read[went]
        sides.append((live, sought) if transposed else (sought, live))
        same_way = transposed == uses[-1][2]
        fed |= live if same_way else sought
        wanted |= sought if same_way else live
    return Reach(~fed & ~dead.inputs, ~wanted & ~dead.outputs, matrix.count(*sides))

"""Estimates the seconds of a training step on a rank, from what the planner counts and the rates of a card."""

from __future__ import annotations

from dataclasses import dataclass

from smet_compile.plan.card import Card
from smet_compile.plan.mesh import Mesh
from smet_compile.plan.per_rank import RankCost

_TIMES_READ = 3
"""A product reads a weight in forward and for the gradient of its input, and writes its gradient."""


@dataclass(frozen=True)
class Work:
    """Holds what a rank computes in a step.

    Args:
        operations: of products and attention, forward and backward.
        weight_bytes: of all parameters, gathered; of those that tensor parallelism cuts, the parts of the rank.
        itemsize: the bytes of an entry of the parameter that has most.
        activations: the bytes that forward leaves for backward.
    """

    operations: float
    weight_bytes: int
    itemsize: int
    activations: int


@dataclass(frozen=True)
class StepTime:
    """Holds the seconds of a step: of products and attention, of the optimizer, and of what is sent."""

    products: float
    update: float
    links: float

    @property
    def compute(self) -> float:
        return self.products + self.update

    @property
    def total(self) -> float:
        """Returns the sum: nothing is sent while something is computed."""
        return self.compute + self.links


def step_time(work: Work, cost: RankCost, mesh: Mesh, card: Card) -> StepTime:
    """Estimates the time of a step.

    Products take operations / rate, or as long as it takes to read the weights in forward and backward and to write
    their gradients, whichever is more (roofline: Williams, Waterman, Patterson, 2009). The optimizer reads the rank's
    share of parameters, gradients and moments, and writes parameters and moments. Collectives are rings (Patarasuk,
    Yuan, 2009), whose bytes ``Traffic`` has; ranks of "tp" are neighbours, then come those of "dp", then copies.
    """
    products = max(work.operations / card.rate(work.itemsize), _TIMES_READ * work.weight_bytes / card.bandwidth)
    update = (3 * cost.parameters + 2 * cost.moments) / card.bandwidth
    rings = {
        "all-gather": (mesh.shards, mesh.parts),
        "reduce-scatter": (mesh.shards, mesh.parts),
        "all-reduce": (mesh.replicas, mesh.parts * mesh.shards),
        "tensor parallel": (mesh.parts, 1),
    }
    links = sum(card.seconds_to_send(count, *rings[kind]) for kind, count in cost.traffic.step.items())
    return StepTime(products, update, links)

"""What reaches what through active weights: liveness of every unit both ways, and the number of paths.

A unit is zero (always, whatever the input), constant (only biases come to it), or live: an active path leads to it
from the model's input. It is read where an active path leads from it to the model's output. A factor that is zero
blocks the paths through the other factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from smet_compile.microscope.flow import Flow, Link, Node
from smet_compile.microscope.matrices import ActiveMatrix

ZERO, CONSTANT, LIVE = 0, 1, 2
_START = {"zero": ZERO, "constant": CONSTANT, "input": LIVE}
Matrices = Mapping[str, ActiveMatrix]


@dataclass(frozen=True)
class Paths:
    """Numbers of paths to some units: ``share`` times e to the ``log_scale``; the largest share is 1, or all are 0."""

    share: Tensor
    log_scale: float

    @classmethod
    def of(cls, counts: Tensor, log_scale: float) -> Paths:
        largest = float(counts.max()) if counts.numel() else 0.0
        return cls(counts / largest, log_scale + math.log(largest)) if largest > 0 else cls(counts, -math.inf)

    def at(self, log_scale: float) -> Tensor:
        """The numbers over e to the ``log_scale``, which is as large at least."""
        return self.share * math.exp(self.log_scale - log_scale) if self.log_scale > -math.inf else self.share

    @property
    def log10(self) -> float:
        """Of the sum over all units; minus infinity where there is no path."""
        total = float(self.share.sum())
        return (self.log_scale + math.log(total)) / math.log(10) if total > 0 else -math.inf


def states(flow: Flow, matrices: Matrices) -> list[Tensor]:
    """Of each unit of each node: ZERO, CONSTANT or LIVE (uint8)."""
    found: list[Tensor] = []
    for node in flow.nodes:
        if node.kind in _START:
            found.append(torch.full((node.num_units,), _START[node.kind], dtype=torch.uint8))
        elif node.kind == "matrix":
            come = found[node.links[0].source]
            through = [_through(node, matrices, (come >= level).double()) > 0 for level in (CONSTANT, LIVE)]
            found.append(through[0].to(torch.uint8) + through[1])
        else:
            brought = [_spread(link, found[link.source], node.num_units) for link in node.links]
            state = torch.stack(brought).amax(0)
            blocked = torch.stack(brought).amin(0) == ZERO
            found.append(state.masked_fill(blocked, ZERO) if node.kind == "product" else state)
    return found


def _through(node: Node, matrices: Matrices, come: Tensor) -> Tensor:
    matrix = matrices[node.weight]
    return matrix.to_cols(come) if node.transposed else matrix.to_rows(come)


def _spread(link: Link, state: Tensor, num_units: int) -> Tensor:
    """The largest state that a link brings to each unit."""
    if link.to is None:
        return state[link.of]
    return torch.zeros(num_units, dtype=torch.uint8).scatter_reduce_(0, link.to, state[link.of], "amax")


def _open(node: Node, link: Link, found: list[Tensor]) -> Tensor | None:
    """Of a product: where no other factor is zero."""
    if node.kind != "product":
        return None
    others = [found[other.source][other.of] != ZERO for other in node.links if other is not link]
    return torch.stack(others).all(0)


def read(flow: Flow, matrices: Matrices, found: list[Tensor]) -> list[Tensor]:
    """Of each unit of each node: whether an active path leads from it to the output (bool)."""
    is_read = [torch.zeros(node.num_units, dtype=torch.bool) for node in flow.nodes]
    is_read[flow.output][:] = True
    for number in reversed(range(len(flow.nodes))):
        node, wanted = flow.nodes[number], is_read[number]
        for link in node.links:
            if node.kind == "matrix":
                matrix = matrices[node.weight]
                back = matrix.to_rows if node.transposed else matrix.to_cols
                is_read[link.source] |= back(wanted.double()) > 0
                continue
            through = wanted if link.to is None else wanted[link.to]
            gate = _open(node, link, found)
            is_read[link.source][link.of[through if gate is None else through & gate]] = True
    return is_read


def paths(flow: Flow, matrices: Matrices, found: list[Tensor]) -> Paths:
    """Numbers of paths from the input to the output, counted forwards: every node adds up what comes to it."""
    counted: list[Paths] = []
    for node in flow.nodes:
        if node.kind in _START:
            count = torch.full((node.num_units,), float(node.kind == "input"), dtype=torch.float64)
            counted.append(Paths.of(count, 0.0))
        elif node.kind == "matrix":
            come = counted[node.links[0].source]
            counted.append(Paths.of(_through(node, matrices, come.share), come.log_scale))
        else:
            counted.append(_sum_of_paths(node, counted, found))
    return counted[flow.output]


def _sum_of_paths(node: Node, counted: list[Paths], found: list[Tensor]) -> Paths:
    scale = max(counted[link.source].log_scale for link in node.links)
    total = torch.zeros(node.num_units, dtype=torch.float64)
    for link in node.links if scale > -math.inf else ():
        gate = _open(node, link, found)
        count = counted[link.source].at(scale)[link.of]
        count = count if gate is None else count * gate
        total = total + count if link.to is None else total.index_add_(0, link.to, count)
    return Paths.of(total, scale)

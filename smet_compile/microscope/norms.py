"""Finds what a norm or a softmax takes over units, and then combines with the same units again.

A mean or a variance makes every unit depend on every other, by a little; no path is followed through it. But a mean
that scales other units than those it was taken over is a path as any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smet_compile.microscope.flow import Flow, Link
from smet_compile.microscope.units import Units, narrowed, single, varies


def without_statistics(flow: Flow, values: list[Units]) -> list[Units]:
    """Factors or summands of one shape; those that are statistics of the others become constants."""
    return [
        single(flow.CONSTANT, tuple(value.labels.shape))
        if any(_meets_again(flow, value, other) for other in values if other is not value)
        else value
        for value in values
    ]


def _meets_again(flow: Flow, statistic: Units, other: Units) -> bool:
    """Whether each statistic meets all units it was taken over, in the latest node that both follow from."""
    common = flow.nodes[statistic.node].reduced & flow.nodes[other.node].lineage
    dims = range(statistic.labels.dim())
    if not common or not any(varies(other.labels, d) and not varies(statistic.labels, d) for d in dims):
        return False
    base, num_units = common.bit_length() - 1, flow.nodes[other.node].num_units
    keys = torch.unique(narrowed(statistic.labels) * num_units + narrowed(other.labels))
    each = torch.unique(keys // num_units)
    over = _traced(flow, statistic.node, each, each, base, whole=True)
    met = _traced(flow, other.node, keys // num_units, keys % num_units, base, whole=False)
    return over is not None and met is not None and bool(torch.isin(over, met).all())


def _traced(flow: Flow, node: int, of: Tensor, units: Tensor, base: int, whole: bool) -> Tensor | None:
    """Pairs of ``of`` and a unit of ``base`` that ``units`` of ``node`` are made of, each pair as one number.

    None where something else is in them too, and they should be ``whole``.
    """
    num_units = flow.nodes[base].num_units
    waiting = {node: of * flow.nodes[node].num_units + units}
    while (number := max(waiting)) != base:
        keys, size = torch.unique(waiting.pop(number)), flow.nodes[number].num_units
        for link in flow.nodes[number].links:
            source = flow.nodes[link.source]
            if (source.lineage | source.reduced) >> base & 1:
                to, into = _sources(link, keys % size)
                made = (keys // size)[to] * source.num_units + into
                waiting[link.source] = torch.cat([waiting[link.source], made]) if link.source in waiting else made
            elif whole and link.source not in (flow.CONSTANT, flow.ZERO):
                return None
    assert len(waiting) == 1 and flow.nodes[base].num_units == num_units
    return torch.unique(waiting[base])


def _sources(link: Link, units: Tensor) -> tuple[Tensor, Tensor]:
    """What enters ``units``: (which of them, unit of the source) for each pair."""
    if link.to is None:
        return torch.arange(units.numel()), link.of[units]
    order = torch.argsort(link.to, stable=True)
    entered = link.to[order]
    first, after = torch.searchsorted(entered, units), torch.searchsorted(entered, units, right=True)
    count = after - first
    to = torch.arange(units.numel()).repeat_interleave(count)
    place = torch.arange(int(count.sum())) - (count.cumsum(0) - count)[to] + first[to]
    return to, link.of[order[place]]

"""Makes new units of others: elementwise, along dimensions, or all of them into one."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from smet_compile.microscope.flow import Flow, Kind, Link
from smet_compile.microscope.norms import without_statistics
from smet_compile.microscope.units import Units, narrowed, settled, single, varies

MOST_PAIRS = 1 << 22


def combine(flow: Flow, kind: Kind, values: list[Units], shape: tuple[int, ...]) -> Units:
    """An elementwise sum or product of tensors that broadcast to ``shape``."""
    values = [Units(value.node, value.labels.expand(shape)) for value in values]
    values = without_statistics(flow, values)
    neutral = flow.CONSTANT if kind == "product" else flow.ZERO
    if kind == "product" and any(value.node == flow.ZERO for value in values):
        return single(flow.ZERO, shape)
    values = [value for value in values if value.node != neutral] or [single(neutral, shape)]
    if len(values) == 1:
        return values[0]
    if all(value.node == flow.CONSTANT for value in values):
        return single(flow.CONSTANT, shape)
    wide = torch.broadcast_tensors(*(narrowed(value.labels) for value in values))
    labels, members = _tuples(list(wide), [flow.nodes[value.node].num_units for value in values])
    links = tuple(Link(value.node, of) for value, of in zip(values, members, strict=True))
    reduced = 0
    if all(flow.nodes[value.node].reduced or value.node == flow.CONSTANT for value in values):
        for value in values:
            reduced |= flow.nodes[value.node].reduced
    node = flow.add(kind, members[0].numel(), links, elementwise=True, reduced=reduced)
    return Units(node, labels.expand(shape))


def _tuples(wide: list[Tensor], sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Numbers the tuples of labels that occur together: (number at each place, the labels in each tuple)."""
    labels, members = wide[0], [torch.arange(sizes[0])]
    for other, size in zip(wide[1:], sizes[1:], strict=True):
        count = members[0].numel()
        if size == 1:
            members.append(torch.zeros(count, dtype=torch.int64))
        elif size == count and torch.equal(labels, other):
            members.append(torch.arange(count))
        else:
            keys, labels = torch.unique(labels * size + other, return_inverse=True)
            members = [member[keys // size] for member in members] + [keys % size]
    return settled(labels), members


def gather(flow: Flow, value: Units, dims: Sequence[int], statistic: bool = False) -> Units:
    """Everything along ``dims`` becomes one: size 1 there. ``statistic``: as a mean does, not as a product."""
    labels = value.labels
    if not any(varies(labels, dim) for dim in dims):
        for dim in dims:
            labels = labels.narrow(dim, 0, 1) if labels.shape[dim] else labels.new_zeros(1).expand(labels.shape)
        return Units(value.node, labels)
    full = narrowed(labels)
    left = [dim for dim in range(full.dim()) if dim not in dims and full.shape[dim] > 1]
    shape = [full.shape[dim] if dim in left else 1 for dim in range(full.dim())]
    places = torch.arange(prod(shape)).view(shape)
    num_units = flow.nodes[value.node].num_units
    pairs = torch.unique(places.expand_as(full) * num_units + full)
    link = Link(value.node, pairs % num_units, pairs // num_units)
    reduced = flow.nodes[value.node].lineage if statistic else 0
    node = flow.add("sum", places.numel(), (link,), reduced=reduced)
    kept = [1 if dim in dims else size for dim, size in enumerate(labels.shape)]
    return Units(node, places.expand(kept))


def pooled(flow: Flow, values: list[Units], shape: tuple[int, ...]) -> Units:
    """One unit that everything enters: what an op does that is not known to keep units apart."""
    links = []
    for value in values:
        if value.node not in (flow.CONSTANT, flow.ZERO) and value.labels.numel():
            of = torch.unique(narrowed(value.labels))
            links.append(Link(value.node, of, torch.zeros_like(of)))
    if not links:
        return single(flow.CONSTANT, shape)
    return single(flow.add("sum", 1, tuple(links)), shape)


def or_else(flow: Flow, made: Units, other: Units) -> Units:
    """``made``; where that is constant but ``other`` has chosen it, what depends on ``other``."""
    if made.node != flow.CONSTANT or other.node in (flow.CONSTANT, flow.ZERO):
        return made
    return combine(flow, "sum", [other, single(flow.CONSTANT, ())], tuple(made.labels.shape))

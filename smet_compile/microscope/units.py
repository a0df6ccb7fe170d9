"""Units of a tensor: a label for each of its elements, saying which unit of a node of the flow it belongs to.

Labels have the tensor's shape. They are expanded (stride 0) along every dimension that tells no units apart, so they
take memory for units only, and ops that only move elements can be applied to them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from smet_compile.microscope.flow import Flow, Kind, Link

MOST_PAIRS = 1 << 22


@dataclass(frozen=True)
class Units:
    """What is known of a tensor: its elements belong to units ``labels`` of node ``node``."""

    node: int
    labels: Tensor


@dataclass(frozen=True)
class Weight:
    """A matrix, or a stack of them, in any arrangement: the row and the column that each element stands in.

    Rows are numbered through all matrices of the stack, columns too. ``chosen``: it is one matrix of a stack, or
    several, at places that only the data know; the labels of all lie along a first dimension that the tensor lacks.
    """

    name: str
    rows: Tensor
    cols: Tensor
    num_rows: int
    num_cols: int
    chosen: bool = False


Value = Units | Weight


def single(node: int, shape: tuple[int, ...]) -> Units:
    """All elements belong to the one unit of ``node``."""
    return Units(node, torch.zeros((), dtype=torch.int64).expand(shape))


def varies(labels: Tensor, dim: int) -> bool:
    return labels.shape[dim] > 1 and labels.stride(dim) != 0


def narrowed(labels: Tensor) -> Tensor:
    """With size 1 wherever the labels do not vary."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def settled(labels: Tensor) -> Tensor:
    """The same labels, expanded along every dimension on which they do not vary."""
    shape = labels.shape
    labels = narrowed(labels)
    for dim in range(labels.dim()):
        first = labels.narrow(dim, 0, 1) if labels.shape[dim] else labels
        if varies(labels, dim) and torch.equal(labels, first.expand_as(labels)):
            labels = first
    return labels.expand(shape)


def reshaped(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """As ``reshape``. Dimensions that stay what they are and tell no units apart stay expanded."""
    if prod(shape) == 0:
        return torch.zeros((), dtype=torch.int64).expand(shape)
    inner = list(shape)
    for step in (1, -1):
        dims = range(labels.dim()) if step == 1 else range(-1, -labels.dim() - 1, -1)
        for dim in dims:
            if not -len(shape) <= dim < len(shape) or labels.shape[dim] != inner[dim]:
                break
            if not varies(labels, dim):
                labels, inner[dim] = labels.narrow(dim, 0, 1), 1
    return settled(labels.reshape(inner)).expand(shape)


def drop_statistics(flow: Flow, values: list[Units], shape: tuple[int, ...]) -> list[Units]:
    """Without what a norm or a softmax takes over units and then combines with the same units again.

    A mean or a variance makes every unit depend on every other, by a little; no path is followed through it.
    """
    wide = [value.labels.expand(shape) for value in values]
    kept = []
    for value, labels in zip(values, wide, strict=True):
        reduced = flow.nodes[value.node].reduced
        back = reduced and any(
            flow.nodes[other.node].lineage & reduced
            and any(varies(more, dim) and not varies(labels, dim) for dim in range(len(shape)))
            for other, more in zip(values, wide, strict=True)
            if other is not value
        )
        kept.append(single(flow.CONSTANT, shape) if back else value)
    return kept


def combine(flow: Flow, kind: Kind, values: list[Units], shape: tuple[int, ...]) -> Units:
    """An elementwise sum or product of tensors that broadcast to ``shape``."""
    values = drop_statistics(flow, values, shape)
    neutral = flow.CONSTANT if kind == "product" else flow.ZERO
    if kind == "product" and any(value.node == flow.ZERO for value in values):
        return single(flow.ZERO, shape)
    values = [value for value in values if value.node != neutral] or [single(neutral, shape)]
    if len(values) == 1:
        return Units(values[0].node, values[0].labels.expand(shape))
    if all(value.node == flow.CONSTANT for value in values):
        return single(flow.CONSTANT, shape)
    wide = torch.broadcast_tensors(*(narrowed(value.labels.expand(shape)) for value in values))
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

"""Holds the units of a forward and what each is made of, and makes new units of others.

A unit is one feature: a row of a matrix, a channel, an entry of the model's input; tokens and batches are left out.
Each node of the flow holds some units. A tensor has a label for each of its elements, which says which unit of a node
the element belongs to. Labels have the tensor's shape. They are expanded (stride 0) along every dimension that tells
no units apart, so they take memory for units only, and ops that only move elements can be applied to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["input", "constant", "zero", "sum", "product", "matrix"]
MAX_PAIRS = 1 << 22


@dataclass(frozen=True)
class Link:
    """Brings ``units`` of the node ``source`` into units ``targets`` of its node; None: one into each, in order."""

    source: int
    units: Tensor
    targets: Tensor | None = None


@dataclass(frozen=True)
class Node:
    """Holds some units.

    Args:
        kind: how they are made of what the links bring. "matrix": the one link brings all columns, in order.
        num_units: how many. links: where they come from.
        weight: name of the matrix. transposed: its rows come in and its columns go out.
        lineage: bits of the nodes that this one follows from by elementwise steps, itself among them.
        reduced: for a mean, a variance and the like: the lineage of what it was taken over; else 0.
    """

    kind: Kind
    num_units: int
    links: tuple[Link, ...] = ()
    weight: str = ""
    transposed: bool = False
    lineage: int = 0
    reduced: int = 0


@dataclass
class Flow:
    """Holds nodes, each after those it is made of. All of the model's results enter the one unit of ``output``."""

    nodes: list[Node] = field(default_factory=list)
    output: int = -1
    constant: int = field(init=False)
    zero: int = field(init=False)

    def __post_init__(self) -> None:
        self.constant = self.add("constant", 1)
        self.zero = self.add("zero", 1)

    def add(
        self, kind: Kind, num_units: int, links: tuple[Link, ...] = (), *, elementwise: bool = False, reduced: int = 0
    ) -> int:
        """Adds a node and returns its number. ``elementwise``: its lineage goes on through its links."""
        lineage = 1 << len(self.nodes)
        for link in links if elementwise else ():
            lineage |= self.nodes[link.source].lineage
        self.nodes.append(Node(kind, num_units, links, lineage=lineage, reduced=reduced))
        return len(self.nodes) - 1

    def add_matrix(self, weight: str, columns: Link, num_columns: int, num_rows: int, transposed: bool = False) -> int:
        """Adds the product with a matrix: a node for what comes to its columns, and one for its rows."""
        gathered = self.add("sum", num_columns, (columns,))
        links = (Link(gathered, torch.arange(num_columns)),)
        self.nodes.append(Node("matrix", num_rows, links, weight, transposed, lineage=1 << len(self.nodes)))
        return len(self.nodes) - 1

    @property
    def uses(self) -> list[tuple[int, int, Node]]:
        """Returns (number of the node of its columns, of its rows, the latter) for each product with a matrix."""
        return [(node.links[0].source, i, node) for i, node in enumerate(self.nodes) if node.kind == "matrix"]


@dataclass(frozen=True)
class Units:
    """Says of a tensor that its elements belong to units ``labels`` of the node ``node``."""

    node: int
    labels: Tensor


@dataclass(frozen=True)
class Weight:
    """Says of a tensor that it is a matrix, or a stack of them, and which row and column each element stands in.

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
    """Returns a tensor all of whose elements belong to the one unit of ``node``."""
    return Units(node, torch.zeros((), dtype=torch.int64).expand(shape))


def varies(labels: Tensor, dim: int) -> bool:
    """Returns whether the labels tell units apart along ``dim``."""
    return labels.shape[dim] > 1 and labels.stride(dim) != 0


def without_repeats(labels: Tensor) -> Tensor:
    """Returns the labels with size 1 wherever they do not vary."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def expand_repeats(labels: Tensor) -> Tensor:
    """Returns equal labels that are expanded along every dimension on which they repeat."""
    shape = labels.shape
    labels = without_repeats(labels)
    for dim in range(labels.dim()):
        first = labels.narrow(dim, 0, 1) if labels.shape[dim] else labels
        if varies(labels, dim) and torch.equal(labels, first.expand_as(labels)):
            labels = first
    return labels.expand(shape)


def reshape_labels(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshapes labels. Dimensions that stay what they are and tell no units apart stay expanded."""
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
    return expand_repeats(labels.reshape(inner)).expand(shape)


def combine(flow: Flow, kind: Kind, values: list[Units], shape: tuple[int, ...]) -> Units:
    """Makes an elementwise sum or product of tensors that broadcast to ``shape``."""
    values = [Units(value.node, value.labels.expand(shape)) for value in values]
    values = _without_statistics(flow, values)
    neutral = flow.constant if kind == "product" else flow.zero
    if kind == "product" and any(value.node == flow.zero for value in values):
        return single(flow.zero, shape)
    values = [value for value in values if value.node != neutral] or [single(neutral, shape)]
    if len(values) == 1:
        return values[0]
    if all(value.node == flow.constant for value in values):
        return single(flow.constant, shape)
    broadcast = torch.broadcast_tensors(*(without_repeats(value.labels) for value in values))
    labels, members = _number_tuples(list(broadcast), [flow.nodes[value.node].num_units for value in values])
    links = tuple(Link(value.node, units) for value, units in zip(values, members, strict=True))
    reduced = 0
    if all(flow.nodes[value.node].reduced or value.node == flow.constant for value in values):
        for value in values:
            reduced |= flow.nodes[value.node].reduced
    node = flow.add(kind, members[0].numel(), links, elementwise=True, reduced=reduced)
    return Units(node, labels.expand(shape))


def _number_tuples(operands: list[Tensor], sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Numbers the tuples of labels that occur together: (number at each place, the labels in each tuple)."""
    labels, members = operands[0], [torch.arange(sizes[0])]
    for other, size in zip(operands[1:], sizes[1:], strict=True):
        count = members[0].numel()
        if size == 1:
            members.append(torch.zeros(count, dtype=torch.int64))
        elif size == count and torch.equal(labels, other):
            members.append(torch.arange(count))
        else:
            keys, labels = torch.unique(labels * size + other, return_inverse=True)
            members = [member[keys // size] for member in members] + [keys % size]
    return expand_repeats(labels), members


def gather(flow: Flow, value: Units, dims: Sequence[int], statistic: bool = False) -> Units:
    """Makes everything along ``dims`` one unit, with size 1 there. ``statistic``: as a mean does, not a product."""
    labels = value.labels
    if not any(varies(labels, dim) for dim in dims):
        for dim in dims:
            labels = labels.narrow(dim, 0, 1) if labels.shape[dim] else labels.new_zeros(1).expand(labels.shape)
        return Units(value.node, labels)
    full = without_repeats(labels)
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


def pool(flow: Flow, values: list[Units], shape: tuple[int, ...]) -> Units:
    """Makes one unit that everything enters: what an op does that is not known to keep units apart."""
    links = []
    for value in values:
        if value.node not in (flow.constant, flow.zero) and value.labels.numel():
            units = torch.unique(without_repeats(value.labels))
            links.append(Link(value.node, units, torch.zeros_like(units)))
    if not links:
        return single(flow.constant, shape)
    return single(flow.add("sum", 1, tuple(links)), shape)


def follow_choice(flow: Flow, result: Units, choice: Units) -> Units:
    """Returns ``result``, or, where it is constant and ``choice`` has chosen it, units that depend on ``choice``."""
    if result.node != flow.constant or choice.node in (flow.constant, flow.zero):
        return result
    return combine(flow, "sum", [choice, single(flow.constant, ())], tuple(result.labels.shape))


def _without_statistics(flow: Flow, values: list[Units]) -> list[Units]:
    """Makes constants of those factors or summands of one shape that are statistics of the others.

    A norm or a softmax takes a mean or a variance over units and combines it with the same units again. That makes
    every unit depend on every other, by a little; no path is followed through it. But a mean that scales other units
    than those it was taken over is a path as any other.
    """
    return [
        single(flow.constant, tuple(value.labels.shape))
        if any(_meets_again(flow, value, other) for other in values if other is not value)
        else value
        for value in values
    ]


def _meets_again(flow: Flow, statistic: Units, other: Units) -> bool:
    """Returns whether each statistic meets all units it was taken over, in the latest node both follow from."""
    common = flow.nodes[statistic.node].reduced & flow.nodes[other.node].lineage
    dims = range(statistic.labels.dim())
    if not common or not any(varies(other.labels, d) and not varies(statistic.labels, d) for d in dims):
        return False
    base, num_units = common.bit_length() - 1, flow.nodes[other.node].num_units
    keys = torch.unique(without_repeats(statistic.labels) * num_units + without_repeats(other.labels))
    each = torch.unique(keys // num_units)
    over = _trace_back(flow, Units(statistic.node, each), each, base, whole=True)
    met = _trace_back(flow, Units(other.node, keys % num_units), keys // num_units, base, whole=False)
    return over is not None and met is not None and bool(torch.isin(over, met).all())


def _trace_back(flow: Flow, start: Units, owners: Tensor, base: int, whole: bool) -> Tensor | None:
    """Returns the units of node ``base`` that the units ``start`` are made of, each with the owner of that unit.

    Owners are numbers, one for each unit of ``start``; a pair of owner and unit is returned as one number. Returns
    None where something else is in the units too, and they should be made of ``base`` as a ``whole``.
    """
    num_units = flow.nodes[base].num_units
    waiting = {start.node: owners * flow.nodes[start.node].num_units + start.labels}
    while (number := max(waiting)) != base:
        keys, size = torch.unique(waiting.pop(number)), flow.nodes[number].num_units
        for link in flow.nodes[number].links:
            source = flow.nodes[link.source]
            if (source.lineage | source.reduced) >> base & 1:
                entered, units = _sources(link, keys % size)
                pairs = (keys // size)[entered] * source.num_units + units
                waiting[link.source] = torch.cat([waiting[link.source], pairs]) if link.source in waiting else pairs
            elif whole and link.source not in (flow.constant, flow.zero):
                return None
    assert len(waiting) == 1 and flow.nodes[base].num_units == num_units
    return torch.unique(waiting[base])


def _sources(link: Link, units: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what enters ``units`` by a link: (which of them, unit of the source) for each pair."""
    if link.targets is None:
        return torch.arange(units.numel()), link.units[units]
    order = torch.argsort(link.targets, stable=True)
    targets = link.targets[order]
    first, after = torch.searchsorted(targets, units), torch.searchsorted(targets, units, right=True)
    count = after - first
    entered = torch.arange(units.numel()).repeat_interleave(count)
    place = torch.arange(int(count.sum())) - (count.cumsum(0) - count)[entered] + first[entered]
    return entered, link.units[order[place]]

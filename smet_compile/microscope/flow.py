"""Flow: the units of a forward and which of them each is made of, with tokens and batches left out.

A unit is one feature: a row of a matrix, a channel, an entry of the model's input. Each node of the flow holds some.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["input", "constant", "zero", "sum", "product", "matrix"]


@dataclass(frozen=True)
class Link:
    """Units ``of`` of the node ``source`` enter units ``to`` of this one; ``to`` None: one for each, in order."""

    source: int
    of: Tensor
    to: Tensor | None = None


@dataclass(frozen=True)
class Node:
    """Some units.

    Args:
        kind: how they are made of what the links bring. "matrix": the one link brings all columns, in order.
        num_units: how many. links: where from.
        weight: name of the matrix. transposed: its rows come in and its columns go out.
        lineage: bits of the nodes that this one follows from by elementwise steps, itself among them.
        reduced: of a mean, a variance and the like: the lineage of what it was taken over; else 0.
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
    """Nodes, each after those it is made of. ``output`` is the one unit that all of the model's results enter."""

    nodes: list[Node] = field(default_factory=list)
    output: int = -1
    CONSTANT: int = field(init=False)
    ZERO: int = field(init=False)

    def __post_init__(self) -> None:
        self.CONSTANT = self.add("constant", 1)
        self.ZERO = self.add("zero", 1)

    def add(
        self,
        kind: Kind,
        num_units: int,
        links: tuple[Link, ...] = (),
        *,
        weight: str = "",
        transposed: bool = False,
        elementwise: bool = False,
        reduced: int = 0,
    ) -> int:
        """A new node; returns its number. ``elementwise``: its lineage goes on through its links."""
        lineage = 1 << len(self.nodes)
        for link in links if elementwise else ():
            lineage |= self.nodes[link.source].lineage
        self.nodes.append(Node(kind, num_units, links, weight, transposed, lineage, reduced))
        return len(self.nodes) - 1

    def matrix(self, weight: str, columns: Link, num_columns: int, num_rows: int, transposed: bool = False) -> int:
        """The product with a matrix: a node for what comes to its columns, and one for its rows."""
        gathered = self.add("sum", num_columns, (columns,))
        link = Link(gathered, torch.arange(num_columns))
        return self.add("matrix", num_rows, (link,), weight=weight, transposed=transposed)

    @property
    def uses(self) -> list[tuple[int, int, Node]]:
        """(number of the node of its columns, of its rows, the latter) for each product with a matrix."""
        return [(node.links[0].source, i, node) for i, node in enumerate(self.nodes) if node.kind == "matrix"]

    def feeds(self) -> set[tuple[str, str]]:
        """(weight, weight) where the first feeds the second with no other between; "input" and "output" as well."""
        names = ["input", *dict.fromkeys(node.weight for node in self.nodes if node.weight)]
        bit = {name: 1 << i for i, name in enumerate(names)}
        found, coming = set(), list[int]()
        for number, node in enumerate(self.nodes):
            bits = bit["input"] if node.kind == "input" else 0
            for link in node.links:
                bits |= coming[link.source]
            target = "output" if number == self.output else node.weight
            if target:
                found |= {(name, target) for name in names if bits & bit[name]}
            coming.append(bit[node.weight] if node.weight else bits)
        return found

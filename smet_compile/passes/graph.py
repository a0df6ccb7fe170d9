"""What the passes share: the ops they look for, and how a node is made.

Shape suffixes in the passes: S stacked matrices, T tokens, R rows, C cols of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.node import map_arg

import smet_compile.ops.matmul_library  # noqa: F401  registers the products
from smet_compile.format import Layout

aten, prims, smet = torch.ops.aten, torch.ops.prims, torch.ops.smet
UNPACK, PACK = smet.unpack.default, smet.pack.default
MASKED, SAMPLED = smet.masked_matmul.default, smet.sampled_matmul.default
MM, ADDMM, BMM, GROUPED_MM = aten.mm.default, aten.addmm.default, aten.bmm.default, aten._grouped_mm.default

_MADE_ANEW = ("val", "tensor_meta", "eager_input_vals")


@dataclass
class PassReport:
    """What one pass did: how often it fired, and where it did not, with the reason.

    Args:
        name: of the pass.
        matched: number of rewrites.
        skipped: (name of the node that holds a site's topology, reason) of each near miss.
    """

    name: str
    matched: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def calls(graph: fx.Graph, *targets: Any) -> list[fx.Node]:
    """All calls of ``targets``, in the order of the graph."""
    return [node for node in graph.nodes if is_call(node, *targets)]


def val(node: fx.Node) -> Any:
    """The fake tensor that stands for what ``node`` computes."""
    return node.meta["val"]


def add(like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call of ``target`` just before ``like``, which carries the meta of ``like`` (recomputation among it)."""
    with like.graph.inserting_before(like):
        node: fx.Node = like.graph.call_function(target, args, kwargs)
    node.meta.update({key: value for key, value in like.meta.items() if key not in _MADE_ANEW})
    with _fake_mode(args):
        node.meta["val"] = target(*map_arg(args, val), **map_arg(kwargs, val))
    return node


def _fake_mode(args: Any) -> FakeTensorMode:
    found: list[FakeTensorMode] = []

    def look(node: fx.Node) -> fx.Node:
        if isinstance(val(node), torch.Tensor):
            found.append(val(node).fake_mode)
        return node

    map_arg(args, look)
    return found[0]


def is_swap(node: Any) -> bool:
    """Whether ``node`` exchanges the last two dimensions and does no more."""
    if not is_call(node, aten.permute.default):
        return False
    last = val(node).dim() - 1
    return list(node.args[1]) == [*range(last - 1), last, last - 1]


def permuted(like: fx.Node, node: fx.Node) -> fx.Node:
    """``node`` with its last two dimensions exchanged; a permutation undone instead of done twice."""
    if is_swap(node):
        source: fx.Node = node.args[0]  # type: ignore[assignment,unused-ignore]
        return source
    last = val(node).dim() - 1
    return add(like, aten.permute.default, node, [*range(last - 1), last, last - 1])


def flattened(like: fx.Node, node: fx.Node) -> fx.Node:
    """(B, T, X) → (B T, X)."""
    if not val(node).is_contiguous():
        node = add(like, aten.clone.default, node, memory_format=torch.contiguous_format)
    return add(like, aten.view.default, node, [-1, val(node).shape[2]])


def unflattened(like: fx.Node, node: fx.Node, batch: fx.Node, tokens: int) -> fx.Node:
    """(B T, X) → (B, T, X), as many B and T as ``batch`` has in its first dimension and in that of ``tokens``."""
    sizes = [_size(like, batch, dim) for dim in (0, tokens)]
    return add(like, aten.view.default, node, [*sizes, val(node).shape[1]])


def _size(like: fx.Node, node: fx.Node, dim: int) -> int | fx.Node:
    size = val(node).shape[dim]
    return size if isinstance(size, int) else add(like, aten.sym_size.int, node, dim)


@dataclass(frozen=True)
class SiteArgs:
    """The arguments by which pack and unpack name a site."""

    topology: fx.Node
    index: list[fx.Node]
    layout: tuple[list[int], list[int], list[int]]

    @classmethod
    def of(cls, node: fx.Node) -> SiteArgs:
        _, topology, index, shape, matrix, block_shape, *_ = node.args
        return cls(topology, list(index), (list(shape), list(matrix), list(block_shape)))

    @property
    def name(self) -> str:
        return str(self.topology.name)

    @property
    def lay(self) -> Layout:
        return Layout.of_lists(*self.layout)

    def flat(self) -> SiteArgs:
        """A stack of one matrix, as that matrix."""
        shape = self.layout[1] if self.lay.num_matrices == 1 else self.layout[0]
        return SiteArgs(self.topology, self.index, (shape, *self.layout[1:]))

    def args(self) -> tuple[Any, ...]:
        return (self.topology, self.index, *self.layout)

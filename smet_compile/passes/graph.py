"""Provides what all passes need: the ops they look for, helpers to read and add nodes, and their report.

A node's ``meta["val"]`` is the fake tensor for its result, from which shapes and dtypes are read. Helpers that add a
node take ``like`` first: the node that it is put before, and whose ``meta`` it gets.

Shape suffixes in the passes: S stacked matrices, T tokens, R rows, C cols of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from smet_compile.format import Layout

aten, prims, smet = torch.ops.aten, torch.ops.prims, torch.ops.smet
OpOverload = type(aten.mm.default)
UNPACK, PACK = smet.unpack.default, smet.pack.default
SCALE_ROWS = smet.scale_rows.default
MASKED, SAMPLED = smet.masked_matmul.default, smet.sampled_matmul.default
MM, ADDMM, BMM, GROUPED_MM = aten.mm.default, aten.addmm.default, aten.bmm.default, aten._grouped_mm.default
PRODUCTS = (MM, ADDMM, BMM, GROUPED_MM)

_META_NOT_COPIED = ("val", "tensor_meta", "eager_input_vals")


@dataclass
class PassReport:
    """Reports what one pass did.

    Args:
        name: the name of the pass.
        matched: the number of rewrites.
        skipped: (name of the node that holds a site's topology, reason) for each place that it left as it was.
    """

    name: str
    matched: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def calls(graph: fx.Graph, *targets: Any) -> list[fx.Node]:
    """Returns all calls of ``targets``, in the order of the graph."""
    return [node for node in graph.nodes if is_call(node, *targets)]


def val(node: fx.Node) -> Any:
    """Returns the fake tensor that stands for the result of ``node``."""
    return node.meta["val"]


def add(like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Adds a call of ``target`` before ``like``, with the meta of ``like`` (which says whether it is recomputed)."""
    with like.graph.inserting_before(like):
        node: fx.Node = like.graph.call_function(target, args, kwargs)
    node.meta.update({key: value for key, value in like.meta.items() if key not in _META_NOT_COPIED})
    with _fake_mode((args, like.all_input_nodes)):
        node.meta["val"] = target(*map_arg(args, val), **map_arg(kwargs, val))
    return node


def _fake_mode(args: Any) -> Any:
    """Returns the mode of the first fake tensor among the arguments."""
    found: list[Any] = []

    def look(node: fx.Node) -> fx.Node:
        if isinstance(val(node), torch.Tensor):
            found.append(val(node).fake_mode)
        return node

    map_arg(args, look)
    return found[0]


def is_swap(node: Any) -> bool:
    """Tells whether ``node`` only exchanges the last two dimensions."""
    if not is_call(node, aten.permute.default):
        return False
    last = val(node).dim() - 1
    return list(node.args[1]) == [*range(last - 1), last, last - 1]


def permuted(like: fx.Node, node: fx.Node) -> fx.Node:
    """Returns ``node`` with its last two dimensions exchanged. A node that does this itself gives its source."""
    if is_swap(node):
        source: fx.Node = node.args[0]  # type: ignore[assignment,unused-ignore]
        return source
    last = val(node).dim() - 1
    return add(like, aten.permute.default, node, [*range(last - 1), last, last - 1])


def flattened(like: fx.Node, node: fx.Node) -> fx.Node:
    """Adds a view (B, T, X) → (B T, X)."""
    if not val(node).is_contiguous():
        node = add(like, aten.clone.default, node, memory_format=torch.contiguous_format)
    return add(like, aten.view.default, node, [-1, val(node).shape[2]])


def unflattened(like: fx.Node, node: fx.Node, batch: fx.Node, tokens: int) -> fx.Node:
    """Adds a view (B T, X) → (B, T, X), with B and T the sizes of ``batch`` in its dimensions 0 and ``tokens``."""
    sizes = [size(like, batch, dim) for dim in (0, tokens)]
    return add(like, aten.view.default, node, [*sizes, val(node).shape[1]])


def size(like: fx.Node, node: fx.Node, dim: int) -> int | fx.Node:
    """Returns the size of ``node`` in a dimension; a node for it where it is a symbol."""
    found = val(node).shape[dim]
    return found if isinstance(found, int) else add(like, aten.sym_size.int, node, dim)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Returns the arguments of a call by name, with the defaults of those that it leaves out."""
    schema = node.target._schema.arguments
    values = [*node.args, *(argument.default_value for argument in schema[len(node.args) :])]
    return dict(zip((argument.name for argument in schema), values, strict=True)) | dict(node.kwargs)


def updated(node: fx.Node) -> dict[str, Any]:
    """Returns the arguments of a functionalized op by name, with the tensors that it changes, found by their index."""
    kwargs, bases = node.kwargs, node.kwargs["_all_bases"]

    def base(name: str) -> Any:
        length = kwargs.get(f"_{name}_length")
        if length is not None:
            return [bases[kwargs[f"_{name}_{index}_base_index"]] for index in range(length)]
        number = kwargs.get(f"_{name}_base_index")
        return kwargs.get(name) if number is None else bases[number]

    return {argument.name: base(argument.name) for argument in node.args[0]._schema.arguments}


@dataclass(frozen=True)
class SiteArgs:
    """Holds the arguments that tell an op the topology of a site."""

    topology: fx.Node
    lists: fx.Node
    layout_text: str

    @classmethod
    def of(cls, node: fx.Node) -> SiteArgs:
        """Reads them from a call of unpack, pack, masked_matmul or sampled_matmul."""
        named = arguments(node)
        return cls(named["topology"], named["lists"], named["layout"])

    @property
    def name(self) -> str:
        return str(self.topology.name)

    @property
    def layout(self) -> Layout:
        return Layout.from_text(self.layout_text)

    def flat(self) -> SiteArgs:
        """Returns the arguments with a two-dimensional layout where the weight is a stack of one matrix."""
        layout = self.layout
        shape = layout.matrix if layout.num_matrices == 1 else layout.shape
        return SiteArgs(self.topology, self.lists, Layout(shape, layout.matrix, layout.block_shape).text)

    def args(self) -> tuple[Any, ...]:
        return (self.topology, self.lists, self.layout_text)


def operands(product: fx.Node) -> tuple[fx.Node | None, Any, Any]:
    """Returns bias (None without one), left and right operand of a product."""
    args: Any = product.args
    bias, left, right, *_ = args if is_call(product, ADDMM) else (None, *args)
    return bias, left, right


def weight_of(product: fx.Node) -> fx.Node | None:
    """Returns the unpack that is the right operand of ``product``, perhaps transposed; None where there is none."""
    *_, right = operands(product)
    source = right.args[0] if is_swap(right) else right
    if not is_call(source, UNPACK) or not is_plain(product):
        return None
    num_matrices, num_dims = SiteArgs.of(source).layout.num_matrices, val(source).dim()
    if is_call(product, GROUPED_MM):
        sorted_tokens = offsets_of(product) is not None
        fits = num_matrices > 1 and num_dims == 3 and val(product.args[0]).dim() == (2 if sorted_tokens else 3)
    elif is_call(product, BMM):
        fits = num_matrices > 1
    else:
        fits = num_dims == 2
    return source if fits else None


def is_plain(product: fx.Node) -> bool:
    """Tells whether a product has no alpha and no beta, and a grouped product neither a bias nor another dtype."""
    if is_call(product, GROUPED_MM):
        more = [*product.args[3:], *(value for key, value in product.kwargs.items() if key != "offs")]
        return all(value is None for value in more)
    return not product.kwargs


def offsets_of(product: fx.Node) -> fx.Node | None:
    """Returns the node with the rows at which each matrix's tokens end, for a grouped product; else None."""
    if not is_call(product, GROUPED_MM):
        return None
    offsets: Any = product.args[2] if len(product.args) > 2 else product.kwargs.get("offs")
    return offsets

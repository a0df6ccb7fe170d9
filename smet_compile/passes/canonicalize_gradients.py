"""Brings packed gradients to one form: the second half of ``canonicalize``. Products of a sum are packed one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from smet_compile.passes.graph import (
    BMM,
    GROUPED_MM,
    MM,
    PACK,
    PassReport,
    SiteArgs,
    add,
    arguments,
    aten,
    calls,
    flattened,
    is_call,
    is_plain,
    offsets_of,
    operands,
    permuted,
    prims,
    val,
)
from smet_compile.passes.weight_views import CONVERT, Labels, View, is_one, padded, through, whole

_VIEWS: tuple[Any, ...] = (
    aten.permute.default,
    aten.t.default,
    aten.transpose.int,
    aten.clone.default,
    aten.alias.default,
)
_VIEWS += (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default)
_VIEWS += (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


@dataclass(frozen=True)
class Term:
    """Describes one product leftᵀ @ right; the gradient is the sum of such terms.

    Args:
        product: the node that computes it.
        labels: names of its dimensions (``weight_views``). dtypes: conversions that follow, in order.
        rows: (first, end), the rows of the weight that it is the gradient of; None for all.
    """

    product: fx.Node
    labels: Labels
    dtypes: tuple[torch.dtype, ...]
    rows: tuple[int, int] | None


def canonicalize_gradients(graph: fx.Graph, report: PassReport) -> None:
    """Replaces the packed gradient of each weight by a sum of packed products; reports gradients that are no sum."""
    for pack in calls(graph, PACK):
        site = SiteArgs.of(pack)
        start = whole(site.layout)
        if start is None or _is_canonical(pack):
            continue
        terms = _terms(pack.args[0], pack, start.labels, (), None)
        if not terms:
            report.skipped.append((site.name, "its gradient is no sum of matrix products"))
            continue
        num_active = arguments(pack)["num_active"]
        made = [_pack(term, site, num_active) for term in terms]
        total = made[0]
        for more in made[1:]:
            total = add(pack, aten.add.Tensor, total, more)
        pack.replace_all_uses_with(total)
        graph.erase_node(pack)
        report.matched += 1


def _is_canonical(pack: fx.Node) -> bool:
    """Tells whether ``pack`` reads a product of the weight's dimensions directly, and is its only reader."""
    product = pack.args[0]
    right_shape = len(SiteArgs.of(pack).layout.shape) == (2 if is_call(product, MM) else 3)
    stacked = SiteArgs.of(pack).layout.num_matrices > 1
    found = is_call(product, MM) or (stacked and is_call(product, BMM, GROUPED_MM))
    return found and right_shape and len(product.users) == 1


def _terms(
    node: fx.Node,
    user: fx.Node,
    labels: Labels,
    dtypes: tuple[torch.dtype, ...],
    rows: tuple[int, int] | None,
) -> list[Term]:
    """Returns the products that ``node`` is the sum of; empty where it is something else, or where others read it too.

    ``labels`` name its dimensions; ``dtypes`` are the conversions between it and pack, outermost last.
    """
    if len(node.users) != 1:
        return []
    if is_call(node, MM, BMM, GROUPED_MM) or _is_outer(node):
        return _product_term(node, labels, dtypes, rows)
    if is_call(node, *CONVERT):
        seen = through(View(labels), node, node.args[0])
        return [] if seen is None else _terms(node.args[0], node, labels, (*seen.dtypes, *dtypes), rows)
    if is_call(node, aten.add.Tensor) and not node.kwargs and _same_shape(*node.args):
        parts = [_terms(part, node, labels, dtypes, rows) for part in node.args]
        return parts[0] + parts[1] if all(parts) else []
    if is_call(node, aten.sum.dim_IntList) and list(node.args[1]) == [0] and not node.kwargs:
        kept = labels[1:] if len(node.args) > 2 and node.args[2] else labels
        return _terms(node.args[0], node, ("B", *kept), dtypes, rows)
    if is_call(node, aten.slice_scatter.default, aten.cat.default):
        return _parts(node, labels, dtypes, rows)
    if is_call(node, *_VIEWS):
        before = _labels_before(node, labels)
        return [] if before is None else _terms(node.args[0], node, before, dtypes, rows)
    return []


def _same_shape(a: object, b: object) -> bool:
    return isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b and val(a).shape == val(b).shape


def _is_outer(node: fx.Node) -> bool:
    """Tells whether a node is (..., X, 1) times (..., 1, Y): Inductor writes a product over one token so."""
    if not is_call(node, aten.mul.Tensor) or not all(isinstance(factor, fx.Node) for factor in node.args):
        return False
    left, right = (val(factor) for factor in node.args)
    if left.dim() != right.dim() or left.dim() not in (2, 3) or left.dtype != right.dtype:
        return False
    return left.shape[:-2] == right.shape[:-2] and is_one(left.shape[-1]) and is_one(right.shape[-2])


def _product_term(
    node: fx.Node, labels: Labels, dtypes: tuple[torch.dtype, ...], rows: tuple[int, int] | None
) -> list[Term]:
    *stack, first, second = labels
    grouped = is_call(node, GROUPED_MM)
    known = {first, second} == {"R", "C"} and stack in ([], ["S"], ["1"], ["B"])
    fits = known and (not grouped or (stack == ["S"] and val(node.args[1]).dim() == 2))
    return [Term(node, labels, dtypes, rows)] if fits and is_plain(node) else []


def _labels_before(node: fx.Node, labels: Labels) -> Labels | None:
    """Returns the labels of a view's source, given the labels of the view; None where they cannot be told."""
    source = node.args[0]
    if is_call(node, aten.permute.default):
        before = [""] * len(labels)
        for dim, label in zip(node.args[1], labels, strict=True):
            before[dim] = label
        return tuple(before)
    if is_call(node, aten.clone.default, aten.alias.default):
        return labels
    if is_call(node, aten.t.default, aten.transpose.int):
        seen = through(View(labels), node, node)
        return seen.labels if seen else None
    kept = [label for label in labels if label != "1"]
    sizes = [size for label, size in zip(labels, val(node).shape, strict=True) if label != "1"]
    before = []
    for size in val(source).shape:
        if sizes and size == sizes[0]:
            before.append(kept.pop(0))
            sizes.pop(0)
        elif size == 1:
            before.append("1")
        else:
            return None
    return None if kept else tuple(before)


def _parts(node: fx.Node, labels: Labels, dtypes: tuple[torch.dtype, ...], rows: tuple[int, int] | None) -> list[Term]:
    """Returns the terms of a gradient that was written into zeros: that of a slice, or of the parts of a split."""
    if is_call(node, aten.slice_scatter.default):
        args: tuple[Any, ...] = (*node.args, *(0, None, None, 1)[len(node.args) - 2 :])
        into, part, dim, start, end, step = args
        size = val(node).shape[dim]
        first, stop, _ = slice(start, end).indices(size)
        pieces = [(part, (first, stop))] if _is_zero(into) and step == 1 else []
    else:
        dim = node.args[1] if len(node.args) > 1 else 0
        pieces, first = [], 0
        for part in node.args[0]:
            stop = first + val(part).shape[dim]
            pieces += [] if _is_zero(part) else [(part, (first, stop))]
            first = stop
    if not pieces or labels[dim] != "R":
        return []
    offset = rows[0] if rows else 0
    found = [_terms(part, node, labels, dtypes, (offset + first, offset + end)) for part, (first, end) in pieces]
    return [term for terms in found for term in terms] if all(found) else []


def _is_zero(node: fx.Node) -> bool:
    return is_call(node, aten.full.default, aten.full_like.default) and bool(node.args[1] == 0)


def _pack(term: Term, site: SiteArgs, num_active: int) -> fx.Node:
    """Adds pack(mm(permute(left), right)) before the term's product, and its conversions, now of active blocks only."""
    product = term.product
    _, first, second = operands(product)
    if term.labels[-2:] == ("R", "C"):
        left, right = permuted(product, first), second
    else:
        left, right = second, permuted(product, first)
    if term.labels[0] in ("1", "B"):
        left, right = flattened(product, left), flattened(product, right)
    if term.rows:
        left = padded(product, left, term.rows, site.layout.rows)
    offsets = offsets_of(product)
    if offsets is not None:
        dense = add(product, GROUPED_MM, permuted(product, left), right, offsets)
    else:
        dense = add(product, MM if val(left).dim() == 2 else BMM, permuted(product, left), right)
    made = add(product, PACK, dense, *site.flat().args(), num_active)
    for dtype in term.dtypes:
        made = add(product, prims.convert_element_type.default, made, dtype)
    return made

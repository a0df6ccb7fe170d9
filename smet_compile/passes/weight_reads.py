"""Products with an unpacked weight, brought to one form each (half of canonicalize)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from smet_compile.passes.graph import (
    ADDMM,
    BMM,
    GROUPED_MM,
    MM,
    UNPACK,
    PassReport,
    SiteArgs,
    add,
    aten,
    calls,
    flattened,
    is_call,
    permuted,
    prims,
    unflattened,
    val,
)
from smet_compile.passes.weight_views import SPLITS, View, through, whole

PRODUCTS = (MM, ADDMM, BMM, GROUPED_MM)


def canonicalize_reads(graph: fx.Graph, report: PassReport) -> None:
    for unpack in calls(graph, UNPACK):
        start = whole(SiteArgs.of(unpack).lay)
        if start is None:
            continue
        for source, user, view in list(uses(unpack, start)):
            if is_call(user, *PRODUCTS) and not _is_canonical(user, unpack):
                _canonicalize(user, source, unpack, view, report)


def uses(node: fx.Node, view: View) -> Iterator[tuple[fx.Node, fx.Node, View]]:
    """(view of the weight, its user, what the view holds) for every user that is not itself a view."""
    for user in list(node.users):
        if is_call(user, *SPLITS):
            parts = [(part, through(view, part, node)) for part in user.users]
        else:
            parts = [(user, through(view, user, node))]
        for part, seen in parts:
            if seen is None:
                yield node, part, view
            else:
                yield from uses(part, seen)


def _is_canonical(product: fx.Node, unpack: fx.Node) -> bool:
    """The weight is the right operand, as it is or with its last two dimensions exchanged."""
    layout = SiteArgs.of(unpack).lay
    expected = 2 if layout.num_matrices == 1 else 3
    if is_call(product, BMM) and layout.num_matrices == 1 or len(layout.shape) != expected:
        return False
    right = product.args[2 if is_call(product, ADDMM) else 1]
    return right is unpack or (is_call(right, aten.permute.default) and permuted(right, right) is unpack)


def _canonicalize(product: fx.Node, source: fx.Node, unpack: fx.Node, view: View, report: PassReport) -> None:
    bias, left, right, offsets = _operands(product)
    site = SiteArgs.of(unpack)
    on_left = left is source
    if left is right or (on_left and offsets is not None):
        report.skipped.append((site.name, "the weight is multiplied with itself, or sorted tokens come second"))
        return
    other, labels = (right, _swapped(view.labels)) if on_left else (left, view.labels)
    made = _product(product, other, bias if not on_left else None, offsets, site, unpack, view, labels, on_left)
    if made is None:
        report.skipped.append((site.name, "the product mixes the weight's dimensions in a way that is not known"))
        return
    if on_left:
        made = permuted(product, made)
        made = made if bias is None else add(product, aten.add.Tensor, made, bias)
    product.replace_all_uses_with(made)
    product.graph.erase_node(product)
    report.matched += 1


def _operands(product: fx.Node) -> tuple[fx.Node | None, Any, Any, fx.Node | None]:
    """bias, left, right, offsets."""
    if is_call(product, ADDMM):
        return (*product.args[:3], None)  # type: ignore[return-value]
    if is_call(product, GROUPED_MM):
        left, right, *rest = product.args
        return None, left, right, rest[0] if rest else product.kwargs.get("offs")
    return (None, *product.args[:2], None)  # type: ignore[return-value]


def _swapped(labels: tuple[str, ...]) -> tuple[str, ...]:
    return (*labels[:-2], labels[-1], labels[-2])


def _product(
    product: fx.Node,
    other: fx.Node,
    bias: fx.Node | None,
    offsets: fx.Node | None,
    site: SiteArgs,
    unpack: fx.Node,
    view: View,
    labels: tuple[str, ...],
    on_left: bool,
) -> fx.Node | None:
    """``other`` times the weight, in canonical form, before ``product``; None where it has no such form."""
    *stack, inner, outer = labels
    if {inner, outer} != {"R", "C"} or (stack == ["S"]) != (site.lay.num_matrices > 1):
        return None
    if (product.kwargs and not is_call(product, GROUPED_MM)) or (offsets is not None and stack != ["S"]):
        return None  # alpha, beta; experts of which there is one
    transposed = inner == "C"
    batch = other if stack in (["1"], ["B"]) else None
    x = permuted(product, other) if on_left else other
    if batch is not None:
        x = flattened(product, x)
    if view.rows and not transposed:
        x = padded(product, x, view.rows, site.lay.rows)
    weight = _weight(product, unpack, site.flat(), view)
    if transposed:
        weight = permuted(product, weight)
    cut = view.rows is not None and transposed
    made = _call(product, x, weight, None if cut else bias, offsets)
    if cut:
        made = add(product, aten.slice.Tensor, made, 1, *view.rows)
        made = made if bias is None else add(product, aten.add.Tensor, made, bias)
    return made if batch is None else unflattened(product, made, batch)


def _call(product: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, offsets: fx.Node | None) -> fx.Node:
    if offsets is not None:
        return add(product, GROUPED_MM, x, weight, offsets)
    if bias is not None:
        return add(product, ADDMM, bias, x, weight)
    return add(product, MM if val(weight).dim() == 2 else BMM, x, weight)


def _weight(product: fx.Node, unpack: fx.Node, site: SiteArgs, view: View) -> fx.Node:
    """The weight unpacked anew beside its product, from values that were converted before: d times the work."""
    values = unpack.args[0]
    meta = {key: unpack.meta[key] for key in ("recompute", "ac_graph_id") if key in unpack.meta}
    for dtype in view.dtypes:
        values = add(product, prims.convert_element_type.default, values, dtype)
        values.meta.update(meta)
    weight = add(product, UNPACK, values, *site.args(), None, None, False)
    weight.meta.update(meta)
    return weight


def padded(like: fx.Node, node: fx.Node, rows: tuple[int, int], num_rows: int) -> fx.Node:
    """(T, end - first) → (T, R), zeros where the weight's other rows are."""
    return add(like, aten.constant_pad_nd.default, node, [rows[0], num_rows - rows[1]], 0.0)

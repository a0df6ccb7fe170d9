"""Brings every product with a weight, and every gradient of a weight, to one form that later passes look for.

    bmm(view(x), view(permute(convert(unpack(values)))))  →  view(mm(x, permute(unpack(convert(values)))))
    addmm(b, x, permute(unpack(values)))                  →  the same: it is canonical
    mm(unpack(values), x)                                 →  permute(mm(permute(x), permute(unpack(values))))
    mm(x, permute(unpack(values)[a:b]))                   →  mm(x, permute(unpack(values)))[:, a:b]

    pack(convert(permute(mm(permute(x), gy))))            →  convert(pack(mm(permute(gy), x)))
    pack(mm(permute(gy), x) + mm(permute(hy), y))         →  pack(mm(permute(gy), x)) + pack(mm(permute(hy), y))

Permutations, views, copies and conversions between a weight and its product are removed or moved. Conversions (autocast
makes pairs of them) move to the compact values, where their cost is multiplied by the density. Afterwards the weight is
always the right operand, ``unpack`` or ``permute(unpack)``, and a gradient is ``pack(product(permute(left), right))``.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from smet_compile.passes.canonicalize_gradients import canonicalize_gradients
from smet_compile.passes.graph import (
    ADDMM,
    BMM,
    GROUPED_MM,
    MM,
    PACK,
    PRODUCTS,
    UNPACK,
    PassReport,
    SiteArgs,
    add,
    aten,
    calls,
    flattened,
    is_call,
    is_plain,
    offsets_of,
    operands,
    permuted,
    prims,
    unflattened,
    val,
    weight_of,
)
from smet_compile.passes.weight_views import SPLITS, View, padded, through, whole


def canonicalize(graph: fx.Graph) -> PassReport:
    """Rewrites the reads of weights and then their gradients."""
    report = PassReport("canonicalize")
    _canonicalize_reads(graph, report)
    canonicalize_gradients(graph, report)
    graph.eliminate_dead_code()
    return report


def _canonicalize_reads(graph: fx.Graph, report: PassReport) -> None:
    for unpack in calls(graph, UNPACK):
        start = whole(SiteArgs.of(unpack).layout)
        if start is None:
            continue
        replaced: set[fx.Node] = set()
        for source, user, view in list(uses(unpack, start)):
            if user in replaced or not _needs_canonical_form(user):
                continue
            if _canonicalize(user, source, unpack, view, report):
                replaced.add(user)


def uses(node: fx.Node, view: View) -> Iterator[tuple[fx.Node, fx.Node, View]]:
    """Yields (view of the weight, its user, description of the view) for every user that is not itself a view."""
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


def _needs_canonical_form(node: fx.Node) -> bool:
    """Tells whether a node is a product that is not canonical: no weight is its right operand, and no pack reads it."""
    packed = any(is_call(user, PACK) for user in node.users)
    return is_call(node, *PRODUCTS) and weight_of(node) is None and not packed


def _canonicalize(product: fx.Node, source: fx.Node, unpack: fx.Node, view: View, report: PassReport) -> bool:
    """Replaces ``product`` by its canonical form; returns False where it has none."""
    bias, left, right = operands(product)
    offsets = offsets_of(product)
    site = SiteArgs.of(unpack)
    on_left = left is source
    if left is right or (on_left and offsets is not None):
        report.skipped.append((site.name, "the weight is multiplied with itself, or sorted tokens come second"))
        return False
    if source not in (left, right):
        report.skipped.append((site.name, "the weight is added to a product of others"))
        return False
    other, labels = (right, _swapped(view.labels)) if on_left else (left, view.labels)
    made = _product(product, other, bias if not on_left else None, offsets, site, unpack, view, labels, on_left)
    if made is None:
        report.skipped.append((site.name, "the product mixes the weight's dimensions in a way that is not known"))
        return False
    if on_left:
        made = permuted(product, made)
        made = made if bias is None else add(product, aten.add.Tensor, made, bias)
    product.replace_all_uses_with(made)
    product.graph.erase_node(product)
    report.matched += 1
    return True


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
    """Adds ``other`` times the weight, in canonical form, before ``product``; returns None if it has no such form."""
    *stack, inner, outer = labels
    if {inner, outer} != {"R", "C"} or (stack == ["S"]) != (site.layout.num_matrices > 1):
        return None
    if not is_plain(product) or (offsets is not None and stack != ["S"]):
        return None  # a grouped product with a single matrix, which has no dimension S
    transposed = inner == "C"
    batch = other if stack in (["1"], ["B"]) else None
    x = permuted(product, other) if on_left else other
    if batch is not None:
        x = flattened(product, x)
    if view.rows and not transposed:
        x = padded(product, x, view.rows, site.layout.rows)
    weight = _weight(product, unpack, site.flat(), view)
    if transposed:
        weight = permuted(product, weight)
    is_slice = transposed and view.rows is not None
    made = _call(product, x, weight, None if is_slice else bias, offsets)
    if transposed and view.rows is not None:
        made = add(product, aten.slice.Tensor, made, val(made).dim() - 1, *view.rows)
        made = made if bias is None else add(product, aten.add.Tensor, made, bias)
    return made if batch is None else unflattened(product, made, batch, 2 if on_left else 1)


def _call(product: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, offsets: fx.Node | None) -> fx.Node:
    if offsets is not None:
        return add(product, GROUPED_MM, x, weight, offsets)
    if bias is not None:
        return add(product, ADDMM, bias, x, weight)
    return add(product, MM if val(weight).dim() == 2 else BMM, x, weight)


def _weight(product: fx.Node, unpack: fx.Node, site: SiteArgs, view: View) -> fx.Node:
    """Unpacks the weight again before its product, from values that are converted first, in d times the work."""
    values = unpack.args[0]
    meta = {key: unpack.meta[key] for key in ("recompute", "ac_graph_id") if key in unpack.meta}
    for dtype in view.dtypes:
        values = add(product, prims.convert_element_type.default, values, dtype)
        values.meta.update(meta)
    weight = add(product, UNPACK, values, *site.args(), None, None, False)
    weight.meta.update(meta)
    return weight

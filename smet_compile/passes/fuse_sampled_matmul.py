"""Replaces packed products by ``sampled_matmul``, which computes active blocks only; no dense gradient is made.

    pack(mm(permute(gy), x), ...)   →  sampled_matmul(gy, x, ...)

bmm and _grouped_mm of stacked experts are replaced likewise.
"""

from __future__ import annotations

from torch import fx

from smet_compile.passes.graph import (
    BMM,
    GROUPED_MM,
    MM,
    PACK,
    SAMPLED,
    PassReport,
    SiteArgs,
    add,
    arguments,
    calls,
    is_call,
    is_plain,
    offsets_of,
    permuted,
    val,
)


def fuse_sampled_matmul(graph: fx.Graph) -> PassReport:
    """Replaces every product that is read by ``pack`` alone."""
    report = PassReport("fuse_sampled_matmul")
    for pack in calls(graph, PACK):
        product, site = pack.args[0], SiteArgs.of(pack)
        if not is_call(product, MM, BMM, GROUPED_MM) or len(site.layout.shape) != val(product).dim():
            continue
        if len(product.users) != 1:
            report.skipped.append((site.name, "its dense gradient is read by something else as well"))
            continue
        if not is_plain(product):
            continue
        left, right, *_ = product.args
        num_active = arguments(pack)["num_active"]
        made = add(product, SAMPLED, permuted(product, left), right, *site.args(), num_active, offsets_of(product))
        pack.replace_all_uses_with(made)
        graph.erase_node(pack)
        graph.erase_node(product)
        report.matched += 1
    graph.eliminate_dead_code()
    return report

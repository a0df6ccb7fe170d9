"""Replaces products with an unpacked weight by ``masked_matmul``, which reads the values; no dense weight is made.

    mm(x, permute(unpack(values, ...)))         →  masked_matmul(x, values, ..., transposed=True)
    addmm(b, x, permute(unpack(values, ...)))   →  masked_matmul(x, values, ..., transposed=True, bias=b)
    mm(gy, unpack(values, ...))                 →  masked_matmul(gy, values, ..., transposed=False)

The last is the input gradient of a linear layer, or the forward of a Conv1D. bmm and _grouped_mm of stacked experts are
replaced likewise.
"""

from __future__ import annotations

from torch import fx

from smet_compile.passes.graph import (
    MASKED,
    PRODUCTS,
    PassReport,
    SiteArgs,
    add,
    aten,
    calls,
    offsets_of,
    operands,
    val,
    weight_of,
)


def fuse_masked_matmul(graph: fx.Graph) -> PassReport:
    """Replaces every product whose right operand is an unpacked weight."""
    report = PassReport("fuse_masked_matmul")
    for product in calls(graph, *PRODUCTS):
        unpack = weight_of(product)
        if unpack is None:
            continue
        bias, x, weight = operands(product)
        site, transposed = SiteArgs.of(unpack), weight is not unpack
        fused_bias = bias if bias is not None and val(bias).dim() == 1 and _whole_row(product, bias) else None
        made = add(product, MASKED, x, unpack.args[0], *site.args(), transposed, fused_bias, offsets_of(product))
        if bias is not fused_bias:
            made = add(product, aten.add.Tensor, made, bias)
        product.replace_all_uses_with(made)
        graph.erase_node(product)
        report.matched += 1
    graph.eliminate_dead_code()
    return report


def _whole_row(product: fx.Node, bias: fx.Node) -> bool:
    """Tells whether a bias has one number for each output, in the dtype of the output."""
    return bool(val(bias).shape[0] == val(product).shape[-1] and val(bias).dtype == val(product).dtype)

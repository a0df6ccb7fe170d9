"""fuse_masked_matmul: a product with a weight reads the values, and no dense weight is made.

    mm(x, permute(unpack(values, ...)))         →  masked_matmul(x, values, ..., transposed=True)
    addmm(b, x, permute(unpack(values, ...)))   →  masked_matmul(x, values, ..., transposed=True, bias=b)
    mm(gy, unpack(values, ...))                 →  masked_matmul(gy, values, ..., transposed=False)

The last is the input gradient of a linear layer, or the forward of a Conv1D; bmm and _grouped_mm of stacked experts
go the same way.
"""

from __future__ import annotations

from torch import fx

from smet_compile.passes.graph import (
    ADDMM,
    BMM,
    GROUPED_MM,
    MASKED,
    MM,
    UNPACK,
    PassReport,
    SiteArgs,
    add,
    aten,
    calls,
    is_call,
    val,
)


def fuse_masked_matmul(graph: fx.Graph) -> PassReport:
    report = PassReport("fuse_masked_matmul")
    for product in calls(graph, MM, ADDMM, BMM, GROUPED_MM):
        bias, x, weight, offsets = _operands(product)
        transposed = is_call(weight, aten.permute.default)
        unpack = weight.args[0] if transposed else weight
        if not is_call(unpack, UNPACK) or not _fits(product, weight, transposed):
            continue
        site = SiteArgs.of(unpack)
        fused_bias = bias if bias is not None and val(bias).dim() == 1 and _whole_row(product, bias) else None
        made = add(product, MASKED, x, unpack.args[0], *site.args(), transposed, fused_bias, offsets)
        if bias is not fused_bias:
            made = add(product, aten.add.Tensor, made, bias)
        product.replace_all_uses_with(made)
        graph.erase_node(product)
        report.matched += 1
    graph.eliminate_dead_code()
    return report


def _operands(product: fx.Node) -> tuple[fx.Node | None, fx.Node, fx.Node, fx.Node | None]:
    """bias, input, weight, offsets."""
    if is_call(product, ADDMM):
        return (*product.args[:3], None)  # type: ignore[return-value]
    if is_call(product, GROUPED_MM):
        x, weight, *rest = product.args
        return None, x, weight, rest[0] if rest else product.kwargs.get("offs")  # type: ignore[return-value]
    return (None, *product.args[:2], None)  # type: ignore[return-value]


def _fits(product: fx.Node, weight: fx.Node, transposed: bool) -> bool:
    num_dims = val(weight).dim()
    swap = [*range(num_dims - 2), num_dims - 1, num_dims - 2]
    plain = is_call(product, GROUPED_MM) or not product.kwargs
    return plain and (not transposed or list(weight.args[1]) == swap)


def _whole_row(product: fx.Node, bias: fx.Node) -> bool:
    return bool(val(bias).shape[0] == val(product).shape[-1] and val(bias).dtype == val(product).dtype)

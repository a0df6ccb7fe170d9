"""Matrix products as they stand in a graph: their operands, and which of them read a weight."""

from __future__ import annotations

from typing import Any

from torch import fx

from smet_compile.passes.graph import ADDMM, BMM, GROUPED_MM, MM, UNPACK, SiteArgs, is_call, is_swap, val

PRODUCTS = (MM, ADDMM, BMM, GROUPED_MM)


def operands(product: fx.Node) -> tuple[fx.Node | None, Any, Any]:
    """bias, left, right."""
    args: Any = product.args
    bias, left, right, *_ = args if is_call(product, ADDMM) else (None, *args)
    return bias, left, right


def weight_of(product: fx.Node) -> fx.Node | None:
    """The unpack that is the right operand of ``product``, as it is or with its last two dimensions exchanged."""
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
    """No alpha, no beta; of a grouped product neither a bias nor another dtype."""
    if is_call(product, GROUPED_MM):
        more = [*product.args[3:], *(value for key, value in product.kwargs.items() if key != "offs")]
        return all(value is None for value in more)
    return not product.kwargs


def offsets_of(product: fx.Node) -> fx.Node | None:
    """Where the tokens of each matrix end, of a grouped product."""
    if not is_call(product, GROUPED_MM):
        return None
    offsets: Any = product.args[2] if len(product.args) > 2 else product.kwargs.get("offs")
    return offsets

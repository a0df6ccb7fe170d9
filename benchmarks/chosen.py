"""Names the kernels that a measurement ran."""

from __future__ import annotations

from collections.abc import Iterable

import smet_compile as smet
from smet_compile.ops import Site
from smet_compile.ops.choose import Case, kernel_of, update_kernel_of

_PRODUCTS = ("masked_matmul", "sampled_matmul")


def of_products(sites: Iterable[Site]) -> str:
    """Names the kernels that multiply with these weights."""
    cases = [Case(site.values.device, site.values.dtype, site.layout, site.num_active) for site in sites]
    return _listed(kernel_of(op, case) for case in cases for op in _PRODUCTS)


def of_update(optimizer: smet.ActiveAdamW) -> str:
    """Names the kernels that update the optimizer's parameters; gradients are of their dtype."""
    held = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    return _listed(update_kernel_of(optimizer.update_of(p, group)).name for p, group in held)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))

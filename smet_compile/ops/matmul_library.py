"""Registers the products with compact weights under ``torch.ops.smet``: schemas with true mutations, and fakes.

What the passes put in place of a dense product, a dense gradient and its update. They have no autograd of their own:
the graphs that they stand in hold forward and backward already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smet_compile.format import Layout
from smet_compile.ops import check, choose, gate

_LAYOUT = "int[] shape, int[] matrix, int[] block_shape"
_library = torch.library.Library("smet", "FRAGMENT")
_library.define(
    f"masked_matmul(Tensor input, Tensor values, Tensor topology, Tensor[] index, {_LAYOUT}, "
    "bool transposed, Tensor? bias=None, Tensor? offsets=None) -> Tensor"
)
_library.define(
    f"sampled_matmul(Tensor left, Tensor right, Tensor topology, Tensor[] index, {_LAYOUT}, "
    "int num_active, Tensor? offsets=None) -> Tensor"
)
_library.define(
    "sampled_active_adamw_(Tensor(a!) values, Tensor left, Tensor right, Tensor? offsets, "
    "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(f!)? scales, "
    "Tensor(d!) num_skipped, Tensor(e!) step, Tensor lr, Tensor? generation, Tensor? births, Tensor topology, "
    f"Tensor[] index, {_LAYOUT}, float density_rate, float beta1, float beta2, float eps, float weight_decay, "
    "int warmup_steps, bool shared_step, int? noise_seed) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),  # kernels read tables that the host writes anew
)


def _sampled_active_adamw_(values: Tensor, left: Tensor, right: Tensor, offsets: Tensor | None, *update: Any) -> None:
    """``active_adamw_`` by the gradient pack(leftᵀ right), of which nothing is left afterwards.

    ``update`` are the arguments of ``active_adamw_`` after its gradient; where the blocks lie is among them.
    """
    check.update("sampled_active_adamw_", values, *update[:13])
    at_once = choose.fused_update(left, offsets, (values, values, *update))
    if at_once is not None:
        at_once(values, left, right, offsets, *update)
        return
    grad = torch.ops.smet.sampled_matmul(left, right, *update[8:13], values.shape[0], offsets)
    torch.ops.smet.active_adamw_(values, grad.to(values.dtype), *update)


def _masked_matmul(
    input: Tensor,
    values: Tensor,
    topology: Tensor,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
    transposed: bool,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    lists = shape, matrix, block_shape
    case = choose.case_of(values, lists, values.shape[0], offsets)
    gate.check_topology(topology, index, case.layout, case.num_active)
    check.masked_matmul(input, values, case.layout, transposed, bias, offsets)
    compute = choose.compute("masked_matmul", case)
    out: Tensor = compute(input, values, topology, index, *lists, transposed, bias, offsets)
    return out


def _sampled_matmul(
    left: Tensor,
    right: Tensor,
    topology: Tensor,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
    num_active: int,
    offsets: Tensor | None = None,
) -> Tensor:
    lists = shape, matrix, block_shape
    case = choose.case_of(left, lists, num_active, offsets)
    gate.check_topology(topology, index, case.layout, case.num_active)
    check.sampled_matmul(left, right, case.layout, offsets)
    compute = choose.compute("sampled_matmul", case)
    values: Tensor = compute(left, right, topology, index, *lists, num_active, offsets)
    return values


for _name, _implementation in (
    ("masked_matmul", _masked_matmul),
    ("sampled_matmul", _sampled_matmul),
    ("sampled_active_adamw_", _sampled_active_adamw_),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


def _no_gradient(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "masked_matmul and sampled_matmul stand in compiled graphs, which hold their gradients already; multiply with "
        "the module's weight instead"
    )


for _name in ("masked_matmul", "sampled_matmul"):
    torch.library.register_autograd(f"smet::{_name}", _no_gradient, lib=_library)


@torch.library.register_fake("smet::masked_matmul", lib=_library)
def _(
    input: Tensor,
    values: Tensor,
    topology: Tensor,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
    transposed: bool,
    *bias_and_offsets: Tensor | None,
) -> Tensor:
    return input.new_empty(*input.shape[:-1], matrix[0] if transposed else matrix[1])


@torch.library.register_fake("smet::sampled_matmul", lib=_library)
def _(
    left: Tensor,
    right: Tensor,
    topology: Tensor,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
    num_active: int,
    offsets: Tensor | None = None,
) -> Tensor:
    return left.new_empty(Layout.of_lists(shape, matrix, block_shape).values_shape(num_active))


@torch.library.register_fake("smet::sampled_active_adamw_", lib=_library)
def _(*args: Any) -> None:
    return None

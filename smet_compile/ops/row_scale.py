"""Multiplies the gradient of each row of a compact weight by √(k / k̄): the correction of SparseOpt for batch norm.

k is the number of active weights in the row, its fan-in, and k̄ the mean of k over all rows of the weight, empty ones
included, so the mean of the squared factor is 1. ``unpack`` applies it in its backward where a site asks for it
(``CompactWeight.scales_rows``), after the dense gradient has gone to those who collect it.

Shape suffixes: S stacked matrices, M block rows, N active blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smet_compile.format import Topology
from smet_compile.ops import choose, gate
from smet_compile.ops.law import compute_dtype
from smet_compile.ops.library import library
from smet_compile.ops.torch_insides import register_autograd

library.define("scale_rows(Tensor grad, Tensor topology, Tensor lists, str layout) -> Tensor")


def fan_ins(topology: Topology) -> Tensor:
    """Returns the number of active weights (S M,) fp64 in each row of each block row."""
    layout = topology.layout
    widths = torch.full((layout.block_cols,), float(layout.block_shape[1]), dtype=torch.float64)
    widths[-1] -= layout.block_cols * layout.block_shape[1] - layout.cols
    return topology.mask().view(-1, layout.block_cols).double() @ widths.to(topology.bits.device)


def has_equal_fan_in(topology: Topology) -> bool:
    """Tells whether all rows have equally many active weights, so that every factor is 1; waits for the device."""
    found = fan_ins(topology)
    return bool((found == found[0]).all())


def row_factors(topology: Topology) -> tuple[Tensor, Tensor]:
    """Returns √(k / k̄) (S M,) fp64 of each block row, and the number of its active blocks (S M,) int64.

    They are computed once for each topology.
    """
    return topology.constant("row factors", lambda: _row_factors(topology))


def _row_factors(topology: Topology) -> tuple[Tensor, Tensor]:
    layout, found = topology.layout, fan_ins(topology)
    heights = torch.full((layout.block_rows,), float(layout.block_shape[0]), dtype=torch.float64)
    heights[-1] -= layout.block_rows * layout.block_shape[0] - layout.rows
    heights = heights.to(found.device).repeat(layout.num_matrices)
    mean = (found * heights).sum() / heights.sum()
    return (found / mean).sqrt(), topology.mask().view(-1, layout.block_cols).sum(1)


def block_factors(topology: Topology, dtype: torch.dtype) -> Tensor:
    """Returns the factor of each active block in the order of the values: (N,) or (N, 1, 1)."""
    factors, counts = row_factors(topology)
    of_blocks = factors.to(dtype).repeat_interleave(counts, output_size=topology.num_active)
    return of_blocks.view(-1, *[1] * (len(topology.values_shape) - 1))


def _scale_rows(grad: Tensor, bits: Tensor, lists: Tensor, layout: str) -> Tensor:
    topology = gate.find(bits, lists, layout, grad.shape[0])
    if tuple(grad.shape) != topology.values_shape:
        raise ValueError(f"scale_rows: expected a gradient of {topology.values_shape}, got {tuple(grad.shape)}")
    result: Tensor = choose.compute("scale_rows", grad, topology)(grad, topology)
    return result


def scaled(grad: Tensor, topology: Topology) -> Tensor:
    """Returns the scaled gradient of a topology that was checked. The memory of ``grad`` may be that of the result.

    On a CPU new memory costs more than the product, and a gradient that backward has just computed is nobody else's.
    """
    result: Tensor = choose.compute("scale_rows", grad, topology)(grad, topology, in_place=True)
    return result


def scale_rows(grad: Tensor, topology: Topology, in_place: bool = False) -> Tensor:
    """Computes what ``law.scale_rows`` does, from the factors that the topology keeps."""
    return (grad * block_factors(topology, compute_dtype(grad.dtype))).to(grad.dtype)


library.impl("scale_rows", _scale_rows, "CompositeExplicitAutograd")


@torch.library.register_fake("smet::scale_rows", lib=library)
def _(grad: Tensor, bits: Tensor, lists: Tensor, layout: str) -> Tensor:
    return torch.empty_like(grad)


def _save_topology(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.topology = inputs


def _scale_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.smet.scale_rows(grad, *ctx.topology), None, None, None


register_autograd(library, "smet::scale_rows", _scale_backward, _save_topology, _scale_rows)

"""Products with any kind of block: the weight is expanded into a scratch, the vendor's GEMM does the rest.

The scratch comes from PyTorch's caching allocator and goes back to it at once, so all weights of a model share the
memory of the largest, on any number of streams and in CUDA graphs. A sampled product is made a few rows at a time,
which are packed while they lie in the L2 cache: the dense gradient is never whole.

Shape suffixes: S stacked matrices, T tokens, R rows, C cols, I and O inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from smet_compile.format import Layout
from smet_compile.ops.kernels.triton.expand import move, unpack
from smet_compile.ops.kernels.triton.expand_bits import Span

SCRATCH_BYTES = 16 * 2**20
"""Of a sampled product at a time: less than half of the L2 cache, and enough rows for an efficient GEMM."""
_ROWS_OF_A_GEMM = 256
"""Rows are taken in multiples of this where they are cut."""


def masked_matmul(
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
    """input W or input Wᵀ, plus bias, as ``ops.matmul.masked_matmul`` defines it, without ``offsets``."""
    assert offsets is None, "supports() says so"
    dense = unpack(values, topology, index, shape, matrix, block_shape)
    if input.dim() == 2:
        dense_RC = dense.view(matrix)
        return F.linear(input, dense_RC if transposed else dense_RC.mT, bias)
    dense_SRC = dense.view(-1, *matrix)
    weight_SIO = dense_SRC.mT if transposed else dense_SRC
    return input @ weight_SIO if bias is None else torch.baddbmm(bias, input, weight_SIO)


def sampled_matmul(
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
    """pack(leftᵀ right), as ``ops.matmul.sampled_matmul`` defines it, without ``offsets``."""
    assert offsets is None, "supports() says so"
    layout = Layout.of_lists(shape, matrix, block_shape)
    values = left.new_empty(layout.values_shape(num_active))
    left_SRT, right_STC = left.detach().mT, right.detach()
    if left.dim() == 2:
        left_SRT, right_STC = left_SRT.unsqueeze(0), right_STC.unsqueeze(0)
    scratch = left.new_empty(min(layout.num_weights, _most_weights(layout, left.element_size())))
    for matrices, rows in _pieces(layout, left.element_size()):
        here_SRT, here_STC = left_SRT[matrices, rows], right_STC[matrices]
        dense_SRC = scratch[: here_SRT.shape[0] * here_SRT.shape[1] * layout.cols].view(*here_SRT.shape[:2], -1)
        _multiply(here_SRT, here_STC, dense_SRC)
        move(values, dense_SRC, topology, index, layout, _span(layout, matrices, rows), packs=True)
    return values


def _multiply(left_SRT: Tensor, right_STC: Tensor, out_SRC: Tensor) -> None:
    if left_SRT.shape[0] == 1:
        torch.mm(left_SRT[0], right_STC[0], out=out_SRC[0])
    else:
        torch.bmm(left_SRT, right_STC, out=out_SRC)


def _rows_at_once(layout: Layout, item_bytes: int) -> int:
    """Rows of a matrix that fit into the scratch; whole blocks of them, and all if there is room."""
    unit = layout.block_shape[0] * max(1, _ROWS_OF_A_GEMM // layout.block_shape[0])
    fitting = SCRATCH_BYTES // (layout.cols * item_bytes)
    return min(layout.rows, max(unit, fitting // unit * unit))


def _most_weights(layout: Layout, item_bytes: int) -> int:
    """Of a piece: rows of one matrix, or several matrices."""
    rows = _rows_at_once(layout, item_bytes)
    return max(rows * layout.cols, SCRATCH_BYTES // item_bytes)


def _pieces(layout: Layout, item_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Matrices and rows that are multiplied at once: some matrices whole, or some block rows of one."""
    rows = _rows_at_once(layout, item_bytes)
    matrices = max(1, _most_weights(layout, item_bytes) // (layout.rows * layout.cols)) if rows == layout.rows else 1
    for first in range(0, layout.num_matrices, matrices):
        for first_row in range(0, layout.rows, rows):
            yield slice(first, first + matrices), slice(first_row, first_row + rows)


def _span(layout: Layout, matrices: slice, rows: slice) -> Span:
    """The block positions of a piece."""
    bm = layout.block_shape[0]
    per_matrix = layout.block_rows * layout.block_cols
    first = matrices.start * per_matrix + rows.start // bm * layout.block_cols
    if rows.stop < layout.rows:
        return Span(first, first + (rows.stop - rows.start) // bm * layout.block_cols)
    return Span(first, min(matrices.stop, layout.num_matrices) * per_matrix)

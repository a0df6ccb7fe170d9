"""pack: dense → values. unpack: values → dense. The meaning of a compact weight, in plain torch.

Shape suffixes: S stacked matrices, R rows, C cols, M block rows, K block cols, B = S M K blocks, N active
blocks, (bm, bn) the block shape. Masks are bool (B,), positions int64 (N,), both row-major.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smet_compile.format.layout import Layout
from smet_compile.format.topology import positions_of


def _cut(padded_SRC: Tensor, layout: Layout) -> Tensor:
    """Matrices whose blocks fit → a view by block: (S, M, K, bm, bn)."""
    bm, bn = layout.block_shape
    return padded_SRC.view(layout.num_matrices, layout.block_rows, bm, layout.block_cols, bn).transpose(2, 3)


def _by_block(dense: Tensor, layout: Layout) -> Tensor:
    """Dense weight → (S, M, K, bm, bn), zeros where a block hangs over the edge; a view where none does."""
    bm, bn = layout.block_shape
    dense_SRC = dense.reshape(layout.num_matrices, layout.rows, layout.cols)
    over = layout.block_rows * bm - layout.rows, layout.block_cols * bn - layout.cols
    return _cut(F.pad(dense_SRC, (0, over[1], 0, over[0])) if any(over) else dense_SRC, layout)


def _grid(active: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix, block row and block column (N,) of each active block."""
    positions = positions_of(active) if active.dtype == torch.bool else active
    row, col = positions // layout.block_cols, positions % layout.block_cols
    return row // layout.block_rows, row % layout.block_rows, col


def pack(dense: Tensor, active: Tensor, layout: Layout) -> Tensor:
    """The active blocks of ``dense``, in row-major order of position: (N,) or (N, bm, bn).

    ``active`` is their mask (num_blocks,) bool or, for blocks of several weights, their positions (N,) int64.
    """
    if layout.single_weights:
        return dense.reshape(-1)[active]
    return _by_block(dense, layout)[_grid(active, layout)]


def unpack(values: Tensor, active: Tensor, layout: Layout) -> Tensor:
    """The dense weight of ``values``: zero where inactive. ``active`` as in ``pack``."""
    if layout.single_weights:
        return values.new_zeros(layout.num_weights).masked_scatter_(active, values).view(layout.shape)
    bm, bn = layout.block_shape
    padded_SRC = values.new_zeros(layout.num_matrices, layout.block_rows * bm, layout.block_cols * bn)
    _cut(padded_SRC, layout).index_put_(_grid(active, layout), values)
    return padded_SRC[:, : layout.rows, : layout.cols].reshape(layout.shape).contiguous()


def block_sizes(layout: Layout, positions: Tensor) -> Tensor:
    """Number of entries inside the matrix, for the blocks at ``positions`` (N,): bm * bn but at the edges."""
    bm, bn = layout.block_shape
    block_row = positions // layout.block_cols % layout.block_rows
    block_col = positions % layout.block_cols
    height = (layout.rows - block_row * bm).clamp(max=bm)
    width = (layout.cols - block_col * bn).clamp(max=bn)
    return height * width


def dense_positions(positions: Tensor, layout: Layout) -> Tensor:
    """Position in the flat dense weight of each entry of the blocks at ``positions`` (N,): (N, bm, bn) int64.

    Entries that hang over an edge get the position they would have, which is some other entry's: they are zero.
    """
    bm, bn = layout.block_shape
    block = positions.view(-1, 1, 1)
    first_row = block // layout.block_cols % layout.block_rows * bm
    matrix = block // (layout.block_rows * layout.block_cols)
    row = first_row + torch.arange(bm, device=positions.device).view(1, bm, 1)
    col = block % layout.block_cols * bn + torch.arange(bn, device=positions.device).view(1, 1, bn)
    return (matrix * layout.rows + row) * layout.cols + col


def block_means(blocks: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Mean magnitude (N,) of the blocks at ``positions``, over their entries inside the matrix; fp32 at least."""
    if layout.single_weights:
        return _magnitude(blocks).view(-1)
    return _magnitude(blocks).sum((1, 2)) / block_sizes(layout, positions)


def all_block_means(dense: Tensor, layout: Layout) -> Tensor:
    """Mean magnitude (num_blocks,) of every block of a dense tensor."""
    if layout.single_weights:
        return _magnitude(dense).reshape(-1)
    every = torch.arange(layout.num_blocks, device=dense.device)
    return _magnitude(_by_block(dense, layout)).sum((3, 4)).view(-1) / block_sizes(layout, every)


def _magnitude(weights: Tensor) -> Tensor:
    return weights.to(torch.promote_types(weights.dtype, torch.float32)).abs()

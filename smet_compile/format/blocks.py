"""Defines what a compact weight means, in plain torch: ``pack`` is dense → values, ``unpack`` is values → dense.

Shape suffixes: S stacked matrices, R rows, C cols, M block rows, K block cols, B = S M K blocks, N active
blocks, (bm, bn) the block shape. Masks are bool (B,), positions int64 (N,), both row-major.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smet_compile.format.layout import Layout
from smet_compile.format.topology import positions_of


def _split_into_blocks(padded_SRC: Tensor, layout: Layout) -> Tensor:
    """Returns matrices whose sizes are multiples of the block's as a view by block: (S, M, K, bm, bn)."""
    bm, bn = layout.block_shape
    return padded_SRC.view(layout.num_matrices, layout.block_rows, bm, layout.block_cols, bn).transpose(2, 3)


def _by_block(dense: Tensor, layout: Layout) -> Tensor:
    """Returns a dense weight as (S, M, K, bm, bn), zeros where a block hangs over the edge; a view where none does."""
    bm, bn = layout.block_shape
    dense_SRC = dense.reshape(layout.num_matrices, layout.rows, layout.cols)
    over = layout.block_rows * bm - layout.rows, layout.block_cols * bn - layout.cols
    return _split_into_blocks(F.pad(dense_SRC, (0, over[1], 0, over[0])) if any(over) else dense_SRC, layout)


def _grid_coordinates(active: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Returns matrix, block row and block column (N,) of each active block."""
    positions = positions_of(active) if active.dtype == torch.bool else active
    row, col = positions // layout.block_cols, positions % layout.block_cols
    return row // layout.block_rows, row % layout.block_rows, col


def pack(dense: Tensor, active: Tensor, layout: Layout) -> Tensor:
    """Returns the active blocks of ``dense``, in row-major order of position: (N,) or (N, bm, bn).

    ``active`` is their mask (num_blocks,) bool, or their positions (N,) int64.
    """
    if layout.single_weights:
        return dense.reshape(-1)[active]
    return _by_block(dense, layout)[_grid_coordinates(active, layout)]


def unpack(values: Tensor, active: Tensor, layout: Layout) -> Tensor:
    """Returns the dense weight of ``values``: zero where inactive.

    ``active`` is the mask (num_blocks,) bool or, for blocks of several weights, their positions (N,) int64.
    """
    if layout.single_weights:
        return values.new_zeros(layout.num_weights).masked_scatter_(active, values).view(layout.shape)
    bm, bn = layout.block_shape
    padded_SRC = values.new_zeros(layout.num_matrices, layout.block_rows * bm, layout.block_cols * bn)
    _split_into_blocks(padded_SRC, layout).index_put_(_grid_coordinates(active, layout), values)
    return padded_SRC[:, : layout.rows, : layout.cols].reshape(layout.shape).contiguous()


def block_sizes(layout: Layout, positions: Tensor) -> Tensor:
    """Counts the entries inside the matrix (N,) of the blocks at ``positions`` (N,): bm * bn except at the edges."""
    bm, bn = layout.block_shape
    block_row = positions // layout.block_cols % layout.block_rows
    block_col = positions % layout.block_cols
    height = (layout.rows - block_row * bm).clamp(max=bm)
    width = (layout.cols - block_col * bn).clamp(max=bn)
    return height * width


def dense_positions(positions: Tensor, layout: Layout) -> Tensor:
    """Returns where each entry of the blocks at ``positions`` (N,) lies in the flat dense weight: (N, bm, bn) int64.

    An entry that hangs over an edge gets the position of some other entry. That does no harm, since it is zero.
    """
    bm, bn = layout.block_shape
    block = positions.view(-1, 1, 1)
    first_row = block // layout.block_cols % layout.block_rows * bm
    matrix = block // (layout.block_rows * layout.block_cols)
    row = first_row + torch.arange(bm, device=positions.device).view(1, bm, 1)
    col = block % layout.block_cols * bn + torch.arange(bn, device=positions.device).view(1, 1, bn)
    return (matrix * layout.rows + row) * layout.cols + col


def block_means(blocks: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Returns the mean magnitude (N,) of the blocks at ``positions``, over entries inside the matrix; at least fp32."""
    if layout.single_weights:
        return _magnitude(blocks).view(-1)
    return _magnitude(blocks).sum((1, 2)) / block_sizes(layout, positions)


def all_block_means(dense: Tensor, layout: Layout) -> Tensor:
    """Returns the mean magnitude (num_blocks,) of every block of a dense tensor."""
    if layout.single_weights:
        return _magnitude(dense).reshape(-1)
    every = torch.arange(layout.num_blocks, device=dense.device)
    return _magnitude(_by_block(dense, layout)).sum((3, 4)).view(-1) / block_sizes(layout, every)


def _magnitude(weights: Tensor) -> Tensor:
    return weights.to(torch.promote_types(weights.dtype, torch.float32)).abs()

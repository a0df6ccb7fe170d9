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


def to_blocks(dense: Tensor, layout: Layout) -> Tensor:
    """Dense weight → its blocks (B, bm, bn), zeros where a block hangs over the edge."""
    bm, bn = layout.block_shape
    dense_SRC = dense.reshape(layout.num_matrices, layout.rows, layout.cols)
    over_rows, over_cols = layout.block_rows * bm - layout.rows, layout.block_cols * bn - layout.cols
    padded = F.pad(dense_SRC, (0, over_cols, 0, over_rows))
    cut = padded.view(layout.num_matrices, layout.block_rows, bm, layout.block_cols, bn)
    return cut.transpose(2, 3).reshape(layout.num_blocks, bm, bn)


def from_blocks(blocks: Tensor, layout: Layout) -> Tensor:
    """Blocks (B, bm, bn) → the dense weight; what hangs over the edge is cut off."""
    bm, bn = layout.block_shape
    cut = blocks.view(layout.num_matrices, layout.block_rows, layout.block_cols, bm, bn).transpose(2, 3)
    padded = cut.reshape(layout.num_matrices, layout.block_rows * bm, layout.block_cols * bn)
    return padded[:, : layout.rows, : layout.cols].reshape(layout.shape).contiguous()


def _positions(active: Tensor) -> Tensor:
    return positions_of(active) if active.dtype == torch.bool else active


def pack(dense: Tensor, active: Tensor, layout: Layout) -> Tensor:
    """The active blocks of ``dense``, in row-major order of position: (N,) or (N, bm, bn).

    ``active`` is their mask (num_blocks,) bool or their positions (N,) int64.
    """
    blocks = dense.reshape(-1) if layout.single_weights else to_blocks(dense, layout)
    return blocks.index_select(0, _positions(active))


def unpack(values: Tensor, active: Tensor, layout: Layout) -> Tensor:
    """The dense weight of ``values``: zero where inactive. ``active`` as in ``pack``."""
    blocks = values.new_zeros(layout.num_blocks, *values.shape[1:])
    blocks.index_copy_(0, _positions(active), values)
    return blocks.view(layout.shape) if layout.single_weights else from_blocks(blocks, layout)


def block_sizes(layout: Layout, positions: Tensor) -> Tensor:
    """Number of entries inside the matrix, for the blocks at ``positions`` (N,): bm * bn but at the edges."""
    bm, bn = layout.block_shape
    block_row = positions // layout.block_cols % layout.block_rows
    block_col = positions % layout.block_cols
    height = (layout.rows - block_row * bm).clamp(max=bm)
    width = (layout.cols - block_col * bn).clamp(max=bn)
    return height * width


def dense_positions(mask: Tensor, layout: Layout) -> Tensor:
    """Position in the flat dense weight of each entry of the active blocks: (N, bm, bn) int64.

    Entries that hang over an edge get the position they would have, which is some other entry's: they are zero.
    """
    bm, bn = layout.block_shape
    block = positions_of(mask).view(-1, 1, 1)
    first_row = block // layout.block_cols % layout.block_rows * bm
    matrix = block // (layout.block_rows * layout.block_cols)
    row = first_row + torch.arange(bm, device=mask.device).view(1, bm, 1)
    col = block % layout.block_cols * bn + torch.arange(bn, device=mask.device).view(1, 1, bn)
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
    return block_means(to_blocks(dense, layout), every, layout)


def _magnitude(weights: Tensor) -> Tensor:
    return weights.to(torch.promote_types(weights.dtype, torch.float32)).abs()

"""Multiplies with any kind of block: expands the weight into a scratch and calls the vendor's GEMM.

The scratch comes from PyTorch's caching allocator and goes back to it at once, so all weights of a model share the
memory of the largest, on any number of streams and in CUDA graphs. A sampled product is made a few rows at a time,
which are packed while they lie in the L2 cache: the dense gradient is never whole.

Shape suffixes: S stacked matrices, T tokens, R rows, C cols, I and O inputs and outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smet_compile.format import Layout, Topology
from smet_compile.ops.kernels.triton import supports
from smet_compile.ops.kernels.triton.expand import Move, Span, prepare_move, unpack

SCRATCH_BYTES, CACHED_BYTES = 64 * 2**20, 24 * 2**20
"""Most bytes of a sampled product at a time, and those that stay in the L2 cache: half of a Hopper card's."""
_ROWS_OF_A_GEMM, _COLUMNS_OF_A_GEMM = 128, 256
"""A multiprocessor multiplies so many rows at a time in the vendor's GEMM; rows are cut in multiples of it."""
_COST_OF_A_PIECE = 0.02
"""Time between two GEMMs, in times of one multiprocessor's piece of 128 by 256 outputs for some thousand tokens."""
_COST_OUTSIDE_CACHE = 1.08
"""Time of a GEMM whose product goes to memory and back, over one that stays in the cache, for 6,000 tokens."""


def masked_matmul(
    input: Tensor,
    values: Tensor,
    topology: Topology,
    transposed: bool,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Computes input W or input Wᵀ, plus bias, as ``ops.plain.masked_matmul`` defines it, without ``offsets``."""
    assert offsets is None, "supports() says so"
    dense, layout = unpack(values, topology), topology.layout
    if input.dim() == 2:
        dense_RC = dense if layout.shape == layout.matrix else dense.view(layout.matrix)
        return F.linear(input, dense_RC if transposed else dense_RC.mT, bias)
    dense_SRC = dense.view(-1, *layout.matrix)
    weight_SIO = dense_SRC.mT if transposed else dense_SRC
    return input @ weight_SIO if bias is None else torch.baddbmm(bias, input, weight_SIO)


class _Piece(NamedTuple):
    """Describes some rows of a matrix, or some matrices, that are multiplied at once, and how they are packed.

    Args:
        left: index into (S, R, T) or (R, T); None for all. right: index of its matrices; None for all.
        shape: shape of its product, (R, C) for one matrix.
    """

    left: Any
    right: Any
    shape: tuple[int, ...]
    num_weights: int
    move: Move


def sampled_matmul(left: Tensor, right: Tensor, topology: Topology, offsets: Tensor | None = None) -> Tensor:
    """Computes pack(leftᵀ right), as ``ops.plain.sampled_matmul`` defines it, without ``offsets``."""
    assert offsets is None, "supports() says so"
    item_bytes, is_stack = left.dtype.itemsize, left.dim() == 3
    pieces = topology.constant(
        ("sampled_expanded", item_bytes, is_stack),
        lambda: _prepare(topology, item_bytes, is_stack, supports.num_sms(left.device)),
    )
    if left.requires_grad or right.requires_grad:
        left, right = left.detach(), right.detach()
    transposed = left.mT
    values = left.new_empty(pieces[0].move.shape)
    scratch = left.new_empty(pieces[0].shape)  # no other piece is larger
    for piece in pieces:
        dense = scratch
        if piece.shape != pieces[0].shape:
            dense = scratch.view(-1)[: piece.num_weights].view(piece.shape)
        left_RT = transposed if piece.left is None else transposed[piece.left]
        multiply = torch.mm if len(piece.shape) == 2 else torch.bmm
        multiply(left_RT, right if piece.right is None else right[piece.right], out=dense)
        piece.move.launch(values, dense, piece.move.strides)
    return values


def _prepare(topology: Topology, item_bytes: int, is_stack: bool, sms: int) -> list[_Piece]:
    layout = topology.layout
    pieces = []
    for matrices, rows in _pieces(layout, item_bytes, sms):
        num_matrices = min(matrices.stop, layout.num_matrices) - matrices.start
        num_rows = min(rows.stop, layout.rows) - rows.start
        shape: tuple[int, ...] = (num_rows, layout.cols)
        which: tuple[Any, Any] = ((matrices.start, rows), matrices.start)
        if num_matrices > 1:
            shape, which = (num_matrices, *shape), ((matrices, rows), matrices)
        if not is_stack:
            which = (None if num_rows == layout.rows else rows, None)
        move = prepare_move(topology, _span(layout, matrices, rows), packs=True, is_flat=True)
        move = move._replace(strides=(num_rows * layout.cols, layout.cols, 1))
        pieces.append(_Piece(*which, shape, math.prod(shape), move))
    return pieces


def _rows_at_once(layout: Layout, item_bytes: int, sms: int) -> int:
    """Returns how many rows of a matrix are multiplied at once: all of a small one, else as keeps ``sms`` busy.

    A GEMM runs in waves of one piece for each multiprocessor, and its last wave takes as long as a full one. Of the
    numbers of rows that fit into the scratch, the one with the fewest waves for the whole matrix is taken.
    """
    unit = layout.block_shape[0] * max(1, _ROWS_OF_A_GEMM // layout.block_shape[0])
    row_bytes = layout.cols * item_bytes
    if layout.rows <= max(unit, CACHED_BYTES // row_bytes):
        return layout.rows
    candidates = range(unit, max(unit, SCRATCH_BYTES // row_bytes) + 1, unit)
    return min(candidates, key=lambda rows: _waves(layout, rows, sms, rows * row_bytes <= CACHED_BYTES))


def _waves(layout: Layout, rows: int, sms: int, is_cached: bool) -> float:
    """Estimates the time of a matrix that is cut after each ``rows``, in waves."""
    columns = -(-layout.cols // _COLUMNS_OF_A_GEMM)
    whole, rest = divmod(layout.rows, rows)
    waves = whole * math.ceil(-(-rows // _ROWS_OF_A_GEMM) * columns / sms)
    waves += math.ceil(-(-rest // _ROWS_OF_A_GEMM) * columns / sms)
    return waves * (1 if is_cached else _COST_OUTSIDE_CACHE) + (whole + bool(rest)) * _COST_OF_A_PIECE


def _pieces(layout: Layout, item_bytes: int, sms: int) -> Iterator[tuple[slice, slice]]:
    """Yields matrices and rows that are multiplied at once: some matrices whole, or some block rows of one."""
    rows = _rows_at_once(layout, item_bytes, sms)
    matrix_bytes = layout.rows * layout.cols * item_bytes
    matrices = max(1, CACHED_BYTES // matrix_bytes) if rows == layout.rows else 1
    for first in range(0, layout.num_matrices, matrices):
        for first_row in range(0, layout.rows, rows):
            yield slice(first, first + matrices), slice(first_row, first_row + rows)


def _span(layout: Layout, matrices: slice, rows: slice) -> Span:
    """Returns the block positions of a piece."""
    bm = layout.block_shape[0]
    per_matrix = layout.block_rows * layout.block_cols
    first = matrices.start * per_matrix + rows.start // bm * layout.block_cols
    if rows.stop < layout.rows:
        return Span(first, first + (rows.stop - rows.start) // bm * layout.block_cols)
    return Span(first, min(matrices.stop, layout.num_matrices) * per_matrix)

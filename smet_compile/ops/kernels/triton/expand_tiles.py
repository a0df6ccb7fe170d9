"""Tiles, expanded and compacted: a program writes one block, of the dense weight or of ``values``.

Shape suffixes: m and n rows and columns of a block, K block columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smet_compile.format import Index, Layout
from smet_compile.ops.kernels.triton.expand_bits import Span

_ENTRIES = 4096
_LANES_K = 256


@triton.jit
def count_active_before(topology, line, across, block_cols, LANES_K: tl.constexpr):
    """Active blocks of block row ``line`` before block column ``across``."""
    first = line.to(tl.int64) * block_cols
    lane_K = tl.arange(0, LANES_K)
    counted_K = tl.zeros((LANES_K,), tl.int32)
    for start in range(0, across, LANES_K):
        position_K = first + start + lane_K
        byte_K = tl.load(topology + position_K // 8, mask=start + lane_K < across, other=0).to(tl.int32)
        counted_K += (byte_K >> (position_K % 8).to(tl.int32)) & 1
    return tl.sum(counted_K)


@triton.jit
def _expand_tiles(
    values,
    dense,
    topology,
    positions,
    row_starts,
    first_position,
    end_position,
    block_rows,
    block_cols,
    num_rows,
    num_cols,
    stride_s,
    stride_r,
    stride_c,
    WIDTH_M: tl.constexpr,
    WIDTH_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES_K: tl.constexpr,
    PACKS: tl.constexpr,
):
    """Values → dense, a program for each position; or back where ``PACKS``, a program for each active block.

    Of the blocks at ``first_position`` ≤ p < ``end_position``; ``dense`` begins with the first, a block row's first.
    """
    if PACKS:
        block = tl.program_id(0)
        position = tl.load(positions + block)
        if (position < first_position) | (position >= end_position):
            return
        active = True
    else:
        position = first_position + tl.program_id(0)
        active = ((tl.load(topology + position // 8).to(tl.int32) >> (position % 8)) & 1) != 0
    line, across = position // block_cols, position % block_cols
    if not PACKS:
        block = tl.load(row_starts + line)
        if active:
            block += count_active_before(topology, line, across, block_cols, LANES_K)
    first_line = first_position // block_cols
    top, left = line % block_rows * WIDTH_M, across * WIDTH_N
    dense += (line // block_rows - first_line // block_rows).to(tl.int64) * stride_s
    dense += (top - first_line % block_rows * WIDTH_M).to(tl.int64) * stride_r + left.to(tl.int64) * stride_c
    values += block.to(tl.int64) * (WIDTH_M * WIDTH_N)
    for first_m in range(0, WIDTH_M, BLOCK_M):
        for first_n in range(0, WIDTH_N, BLOCK_N):
            m = first_m + tl.arange(0, BLOCK_M)
            n = first_n + tl.arange(0, BLOCK_N)
            within_mn = (m < WIDTH_M)[:, None] & (n < WIDTH_N)[None, :]
            inside_mn = within_mn & (top + m < num_rows)[:, None] & (left + n < num_cols)[None, :]
            dense_mn = dense + m.to(tl.int64)[:, None] * stride_r + n.to(tl.int64)[None, :] * stride_c
            values_mn = values + m[:, None] * WIDTH_N + n[None, :]
            if PACKS:
                tl.store(values_mn, tl.load(dense_mn, mask=inside_mn, other=0.0), mask=within_mn)
            else:
                tl.store(dense_mn, tl.load(values_mn, mask=inside_mn & active, other=0.0), mask=inside_mn)


def expand_tiles(
    values: Tensor, dense_SRC: Tensor, topology: Tensor, lists: Index, layout: Layout, span: Span, packs: bool
) -> None:
    """Writes ``dense_SRC``, which begins with the first block of ``span``, from ``values``; ``packs``: the reverse."""
    bm, bn = layout.block_shape
    block_n = min(128, triton.next_power_of_2(bn))
    _expand_tiles[(values.shape[0] if packs else span.end - span.first,)](
        values,
        dense_SRC,
        topology,
        lists.positions,
        lists.row_starts,
        span.first,
        span.end,
        layout.block_rows,
        layout.block_cols,
        layout.rows,
        layout.cols,
        *dense_SRC.stride(),
        WIDTH_M=bm,
        WIDTH_N=bn,
        BLOCK_M=min(_ENTRIES // block_n, triton.next_power_of_2(bm)),
        BLOCK_N=block_n,
        LANES_K=_LANES_K,
        PACKS=packs,
        num_warps=4,
    )

"""sampled_active_adamw_ for tiles: the gradient's blocks are summed in registers, and moved by from there.

Programs and sums are those of ``sampled_tiles``, so that a fused step is, bit for bit, the product and then its update.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from smet_compile.format import Layout, split_index
from smet_compile.ops.kernels.triton import configs, device
from smet_compile.ops.kernels.triton.adamw import TYPES, kind_of, prepared, readable, update_all
from smet_compile.ops.kernels.triton.adamw_epilogue import update_blocks
from smet_compile.ops.kernels.triton.adamw_rounding import rounded_to
from smet_compile.ops.kernels.triton.adamw_rows import Update
from smet_compile.ops.kernels.triton.dot import dot_precision
from smet_compile.ops.kernels.triton.sampled_tiles import (
    accumulate_tile,
    lanes_of_block,
    num_splits,
    sampled_matmul,
    tokens_of_split,
)

_LINES_TOGETHER = 8
_ENTRIES_OF_A_THREAD = 4
"""Updated at a time; many more would not fit beside the sums in registers."""


@triton.jit
def _sampled_adamw(
    table,
    rates,
    left,
    right,
    positions,
    row_starts,
    offsets,
    num_tokens,
    num_lines,
    block_rows,
    block_cols,
    num_rows,
    num_cols,
    left_stride_s,
    left_stride_t,
    left_stride_r,
    right_stride_s,
    right_stride_t,
    right_stride_c,
    WIDTH_M: tl.constexpr,
    WIDTH_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ALIGNED_M: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    LINES_TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPES: tl.constexpr,
    INDEX: tl.constexpr,
    GENERATION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    BLOCKS: tl.constexpr = BLOCK_N // LANES_N
    program = tl.program_id(0)
    per_group = LINES_TOGETHER * tl.cdiv(block_cols, BLOCKS)
    first_line = program // per_group * LINES_TOGETHER
    together = tl.minimum(LINES_TOGETHER, num_lines - first_line)
    line = first_line + program % per_group % together
    first_block = tl.load(row_starts + line) + program % per_group // together * BLOCKS
    end_block = tl.load(row_starts + line + 1)
    if first_block >= end_block:
        return

    matrix = line // block_rows
    _, row_m, inside_m = lanes_of_block(line % block_rows, 0, num_rows, WIDTH_M, BLOCK_M, ALIGNED_M)
    lane_n = tl.arange(0, BLOCK_N)
    block_n = first_block + lane_n // LANES_N
    offset_n = lane_n % LANES_N
    across_n = tl.load(positions + tl.minimum(block_n, end_block - 1)) % block_cols
    col_n = (across_n * WIDTH_N + offset_n).to(tl.int32)
    inside_n = (block_n < end_block) & (offset_n < WIDTH_N) & (col_n < num_cols)
    col_n = tl.where(inside_n, col_n, lane_n % ALIGNED_N)
    col_n = tl.max_contiguous(tl.multiple_of(col_n, ALIGNED_N), ALIGNED_N)
    first, last = tokens_of_split(offsets, matrix, num_tokens, 0, 1, BLOCK_T)
    sum_mn = accumulate_tile(
        left + matrix.to(tl.int64) * left_stride_s,
        right + matrix.to(tl.int64) * right_stride_s,
        row_m,
        col_n,
        first,
        last,
        left_stride_t,
        left_stride_r,
        right_stride_t,
        right_stride_c,
        BLOCK_T,
        PRECISION,
    )
    sum_mn = tl.where(inside_m[:, None] & inside_n[None, :], sum_mn, 0.0)
    grad_mn = rounded_to(sum_mn, 0, left.dtype.element_ty, False).to(tl.float32)
    grad_mn = rounded_to(grad_mn, 0, DTYPES[0], False).to(tl.float32)
    update_blocks(
        table, rates, grad_mn, first_block, end_block, WIDTH_M, WIDTH_N, LANES_N, PARTS, DTYPES, INDEX, GENERATION,
        STOCHASTIC, ALIGNED,
    )  # fmt: skip


def num_parts(rows: int, columns: int, num_warps: int) -> int:
    """In how many parts a piece of the gradient is updated."""
    return max(1, rows * columns // (32 * num_warps * _ENTRIES_OF_A_THREAD))


def fuses(left: Tensor, offsets: Tensor | None, update: tuple[Any, ...]) -> bool:
    """Whether product and update are one kernel: a program holds whole blocks, and the product would not be split.

    Args:
        update: the arguments of ``smet::active_adamw_``, in which any tensor stands for the gradient.
    """
    one = Update(*update)
    layout = one.layout
    if layout is None or not layout.tiles or max(layout.block_shape) > configs.WIDEST:
        return False
    config, columns = _config(left, layout)
    tokens = left.shape[-2] // (1 if offsets is None else layout.num_matrices)
    sms = device.num_sms(left.device)
    return num_splits(sms, layout, tokens, one.values.shape[0], columns, config.tokens) == 1


def _config(left: Tensor, layout: Layout) -> tuple[configs.Sampled, int]:
    """That of the product, and the columns that a program sums."""
    width = layout.block_shape[1]
    config = configs.sampled(device.architecture(left.device), left.dtype, dot_precision(left.dtype), width)
    return config, max(configs.lanes(width), config.columns)


def sampled_active_adamw_(values: Tensor, left: Tensor, right: Tensor, offsets: Tensor | None, *update: Any) -> None:
    """``smet::sampled_active_adamw_``: ``active_adamw_`` by the gradient pack(leftᵀ right), for tiles."""
    one = Update(values, values, *update)
    one = one._replace(lr=one.lr.double())
    if fuses(left, offsets, one):
        _fused(left, right, offsets, one)
        return
    assert one.topology is not None, "tiles are compact"
    layout = one.shape, one.matrix, one.block_shape
    grad = sampled_matmul(left, right, one.topology, one.lists, *layout, values.shape[0], offsets)
    update_all([one._replace(grad=grad.to(values.dtype))])


def _fused(left: Tensor, right: Tensor, offsets: Tensor | None, one: Update) -> None:
    one = readable(one)
    layout, kind = one.layout, kind_of(one)
    assert layout is not None
    bm, bn = layout.block_shape
    config, piece_n = _config(left, layout)
    piece_m, lanes_n = configs.lanes(bm), configs.lanes(bn)
    num_lines = layout.num_matrices * layout.block_rows
    lists = split_index(one.lists[0], layout, one.values.shape[0])
    stacked = left.dim() == 3
    with device.on_device_of(left):
        plan, rates = prepared(kind, [one])
        _sampled_adamw[(num_lines * triton.cdiv(layout.block_cols, piece_n // lanes_n),)](
            plan.table,
            rates,
            left,
            right,
            lists.positions,
            lists.row_starts,
            offsets,
            left.shape[-2],
            num_lines,
            layout.block_rows,
            layout.block_cols,
            layout.rows,
            layout.cols,
            left.stride(0) if stacked else 0,
            left.stride(-2),
            left.stride(-1),
            right.stride(0) if stacked else 0,
            right.stride(-2),
            right.stride(-1),
            WIDTH_M=bm,
            WIDTH_N=bn,
            BLOCK_M=piece_m,
            BLOCK_N=piece_n,
            LANES_N=lanes_n,
            BLOCK_T=config.tokens,
            ALIGNED_M=math.gcd(bm, layout.rows, piece_m),
            ALIGNED_N=math.gcd(bn, layout.cols, lanes_n),
            LINES_TOGETHER=_LINES_TOGETHER,
            PRECISION=dot_precision(left.dtype),
            PARTS=num_parts(piece_m, piece_n, config.num_warps),
            DTYPES=tuple(TYPES[dtype] for dtype in kind.dtypes),
            INDEX=TYPES[kind.positions],
            GENERATION=TYPES[kind.generation],
            STOCHASTIC=kind.stochastic,
            ALIGNED=bn % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in (one.values, one.exp_avg, one.exp_avg_sq)),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )

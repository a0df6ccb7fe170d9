"""Computes sampled_matmul for tiles: the active blocks of leftᵀ right, each summed over the tokens in fp32.

A program makes one piece of the result: some consecutive active blocks of one block row, side by side, so that narrow
tiles share what is read of ``left``; or a part of one block where blocks are wide. Where there are too few programs to
fill the device the tokens are split, and a second pass adds the parts in their order: the same bits every time.

Programs come in groups of block rows, inside a group by column: those that run together read neighbouring columns of
``right`` and few of ``left``, at about the same token, and find them in the L2 cache.

Shape suffixes: T tokens, R rows, C cols, N active blocks, m and n rows and columns of a program's piece.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from smet_compile.format import Topology
from smet_compile.ops.kernels.triton import supports
from smet_compile.ops.kernels.triton.matmul_tiles import dot_precision, multiply_add
from smet_compile.ops.kernels.triton.operands import copy_to_blocks, is_far, needs_copy
from smet_compile.ops.kernels.triton.supports import num_splits

LINES_TOGETHER = 8
_BLOCK_OF_SUM = 1024
_PROGRAMS_PER_SM = 2
_MOST_LENGTHS = 1024
"""How many numbers of tokens are remembered with their number of splits."""


@triton.jit
def tokens_of_split(offsets, matrix, num_tokens, split, num_splits, BLOCK_T: tl.constexpr):
    """Returns first and last token of a split of a matrix's tokens: all ``num_tokens``, or its group in ``offsets``."""
    begin = 0
    end = num_tokens
    if offsets is not None:
        end = tl.load(offsets + matrix)
        begin = tl.load(offsets + matrix - 1, mask=matrix > 0, other=0)
    share = tl.cdiv(tl.cdiv(end - begin, num_splits), BLOCK_T) * BLOCK_T
    first = begin + split * share
    return first, tl.minimum(first + share, end)


@triton.jit
def readable(lane, exists, limit, offset, ALIGNED: tl.constexpr, IS_WHOLE: tl.constexpr):
    """Returns the columns of a factor to read for ``lane``, and whether ``lane`` exists in a matrix of ``limit``.

    Where there is none, it is a harmless one. A factor that ``IS_WHOLE`` has columns up to the end of the last block.
    """
    inside = exists & (lane < limit)
    if IS_WHOLE:
        lane = tl.where(exists, lane, offset % ALIGNED)
    else:
        lane = tl.where(inside, lane, offset % ALIGNED)
    return tl.max_contiguous(tl.multiple_of(lane, ALIGNED), ALIGNED), inside


@triton.jit
def lanes_of_block(
    block, part, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, IS_WHOLE: tl.constexpr
):
    """Finds the rows of the matrix that piece number ``part`` of a block covers.

    Returns: their offsets within the block, (BLOCK,); the columns of the left factor to read, and whether they are
    inside both the block and the matrix.
    """
    offset = part * BLOCK + tl.arange(0, BLOCK)
    row, inside = readable(block * WIDTH + offset, offset < WIDTH, limit, offset, ALIGNED, IS_WHOLE)
    return offset, row, inside


@triton.jit
def lanes_of_blocks(
    positions, first_block, end_block, first_position, offset_n, limit, WIDTH: tl.constexpr, LANES: tl.constexpr,
    ALIGNED: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Finds the columns of the matrix in consecutive active blocks of a row, ``LANES`` for each.

    Args:
        first_position: position of the first block of the row. offset_n: of each lane within its block.

    Returns: (n,) their blocks, the columns of the right factor to read, and whether they are inside the matrix.
    """
    lane_n = tl.arange(0, offset_n.shape[0])
    block_n = first_block + lane_n // LANES
    place_n = tl.load(positions + tl.minimum(block_n, end_block - 1)) - first_position
    exists_n = (block_n < end_block) & (offset_n < WIDTH)
    col_n = (place_n * WIDTH + offset_n).to(tl.int32)
    col_n, inside_n = readable(col_n, exists_n, limit, lane_n, ALIGNED, IS_WHOLE)
    return block_n, exists_n, col_n, inside_n


@triton.jit
def accumulate_tile(
    left,
    right,
    row_m,
    col_n,
    first,
    last,
    left_stride_t,
    left_stride_r,
    right_stride_t,
    right_stride_c,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes leftᵀ right over the tokens first ≤ t < last, at the given rows and columns: (m, n) in fp32.

    Args:
        left, right: pointers to token 0 of the matrix: (T, R) and (T, C).
        row_m, col_n: columns of ``left`` and of ``right``, all of them inside; a power of two of each, at least 16.
        PRECISION: "tf32" or "ieee".
    """
    NUM_M: tl.constexpr = row_m.shape[0]
    NUM_N: tl.constexpr = col_n.shape[0]
    # The wider side goes first in the product, where tensor cores want at least 64.
    SWAPPED: tl.constexpr = NUM_M < 64 and NUM_N > NUM_M
    # The first factor is loaded as it is multiplied: one that is transposed after a load is not copied ahead.
    # Offsets within a step are of 32 bits, half the registers.
    step_T = tl.arange(0, BLOCK_T)
    left += tl.cast(first, tl.int64) * left_stride_t
    right += tl.cast(first, tl.int64) * right_stride_t
    if SWAPPED:
        a_base, a_stride, a_m = right, right_stride_t, col_n * right_stride_c
        b_base, b_stride, b_n = left, left_stride_t, row_m * left_stride_r
    else:
        a_base, a_stride, a_m = left, left_stride_t, row_m * left_stride_r
        b_base, b_stride, b_n = right, right_stride_t, col_n * right_stride_c
    a_mT = a_m[:, None] + (step_T * a_stride)[None, :]
    b_Tn = (step_T * b_stride)[:, None] + b_n[None, :]
    sum_ = tl.zeros((a_m.shape[0], b_n.shape[0]), tl.float32)
    for start in range(first, last, BLOCK_T):
        inside_T = start + step_T < last
        a = tl.load(a_base + a_mT, mask=inside_T[None, :], other=0.0)
        b = tl.load(b_base + b_Tn, mask=inside_T[:, None], other=0.0)
        sum_ = multiply_add(a, b, sum_, PRECISION)
        a_base += tl.cast(a_stride, tl.int64) * BLOCK_T
        b_base += tl.cast(b_stride, tl.int64) * BLOCK_T
    if SWAPPED:
        sum_ = tl.trans(sum_)
    return sum_


@triton.jit
def _sampled_tiles(
    left,
    right,
    out,
    positions,
    row_starts,
    offsets,
    num_active,
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
    LEFT_IS_WHOLE: tl.constexpr,
    RIGHT_IS_WHOLE: tl.constexpr,
    LINES_TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PARTS_M: tl.constexpr = (WIDTH_M + BLOCK_M - 1) // BLOCK_M
    PARTS_N: tl.constexpr = (WIDTH_N + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = BLOCK_N // LANES_N  # of the weight, side by side
    # Program → (group of lines, blocks along the line, line, part of the block).
    program = tl.program_id(0)
    part = program % (PARTS_M * PARTS_N)
    piece = program // (PARTS_M * PARTS_N)
    per_group = LINES_TOGETHER * tl.cdiv(block_cols, BLOCKS)
    first_line = piece // per_group * LINES_TOGETHER
    together = tl.minimum(LINES_TOGETHER, num_lines - first_line)
    line = first_line + piece % per_group % together
    first_block = tl.load(row_starts + line) + piece % per_group // together * BLOCKS
    end_block = tl.load(row_starts + line + 1)
    if first_block >= end_block:
        return

    matrix = line // block_rows
    offset_m, row_m, inside_m = lanes_of_block(
        line % block_rows, part // PARTS_N, num_rows, WIDTH_M, BLOCK_M, ALIGNED_M, LEFT_IS_WHOLE
    )
    offset_n = part % PARTS_N * BLOCK_N + tl.arange(0, BLOCK_N) % LANES_N
    first_position = line.to(positions.dtype.element_ty) * block_cols
    block_n, exists_n, col_n, inside_n = lanes_of_blocks(
        positions, first_block, end_block, first_position, offset_n, num_cols, WIDTH_N, LANES_N, ALIGNED_N,
        RIGHT_IS_WHOLE,
    )  # fmt: skip

    split = tl.program_id(1)
    first, last = tokens_of_split(offsets, matrix, num_tokens, split, tl.num_programs(1), BLOCK_T)
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
    row_of_values = split.to(tl.int64) * num_active + block_n
    to_n = row_of_values * (WIDTH_M * WIDTH_N) + offset_n
    stored = (offset_m < WIDTH_M)[:, None] & exists_n[None, :]
    tl.store(out + offset_m[:, None] * WIDTH_N + to_n[None, :], sum_mn.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _add_splits(parts, out, numel, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums ``NUM_SPLITS`` parts of ``numel`` fp32 each, first to last."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < numel
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(parts + tl.cast(split, tl.int64) * numel + offset, mask=inside, other=0.0)
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=inside)


class ProductLaunch(NamedTuple):
    """Holds the arguments that all launches of a sampled product with one topology share.

    Args:
        lists: positions, and starts of the block rows. sizes: the kernel's arguments after the number of tokens.
        num_programs: programs for one split. blocks_together: blocks of one program.
        splits: (number of tokens, whether there are no offsets) → number of splits.
        joined: constants of kernels that fuse the product with something else, which they keep here.
    """

    kernel: Any
    lists: tuple[Tensor | None, Tensor | None]
    sizes: tuple[int, ...]
    num_programs: int
    blocks_together: int
    values_shape: tuple[int, ...]
    splits: dict[tuple[int, bool], int]
    joined: dict[Any, dict[str, Any]]
    constants: dict[str, Any]


def aligned_factors(left: Tensor, right: Tensor, topology: Topology) -> tuple[Tensor, Tensor, tuple[bool, bool]]:
    """Returns both factors with rows that are read 16 bytes at a time, and for each whether they end with a block."""
    layout = topology.layout
    bm, bn = layout.block_shape
    if needs_copy(left, bm) or is_far(left):
        left = copy_to_blocks(left, bm)
    if needs_copy(right, bn) or is_far(right):
        right = copy_to_blocks(right, bn)
    return left, right, (left.shape[-1] != layout.rows, right.shape[-1] != layout.cols)


def product_launch(left: Tensor, topology: Topology, are_whole: tuple[bool, bool] = (False, False)) -> ProductLaunch:
    """Returns the arguments that all products of a ``left`` of this dtype with this topology share.

    Args:
        are_whole: whether the rows of left and right end with a block, not with the matrix.
    """
    launches: dict[Any, ProductLaunch] = topology.constant("sampled_tiles", dict)
    key = left.dtype, dot_precision(left.dtype), are_whole
    launch = launches.get(key)
    if launch is None:
        launch = launches[key] = _prepare(topology, left, key[1], are_whole)
    return launch


def _prepare(topology: Topology, left: Tensor, precision: str, are_whole: tuple[bool, bool]) -> ProductLaunch:
    layout = topology.layout
    bm, bn = layout.block_shape
    sizes = supports.sampled_sizes(left.device, left.dtype, precision, bn)
    piece_m, lanes_n = supports.lanes(bm), supports.lanes(bn)
    piece_n = max(lanes_n, sizes.columns)
    blocks_together = piece_n // lanes_n
    per_line = triton.cdiv(layout.block_cols, blocks_together) * triton.cdiv(bm, piece_m) * triton.cdiv(bn, piece_n)
    num_lines = layout.num_matrices * layout.block_rows
    return ProductLaunch(
        kernel=supports.on_device(_sampled_tiles, left.device),
        lists=(topology.positions, topology.row_starts),
        sizes=(num_lines, layout.block_rows, layout.block_cols, layout.rows, layout.cols),
        num_programs=num_lines * per_line,
        blocks_together=blocks_together,
        values_shape=layout.values_shape(topology.num_active),
        splits={},
        joined={},
        constants={
            "WIDTH_M": bm,
            "WIDTH_N": bn,
            "BLOCK_M": piece_m,
            "BLOCK_N": piece_n,
            "LANES_N": lanes_n,
            "BLOCK_T": sizes.tokens,
            "ALIGNED_M": math.gcd(bm, 0 if are_whole[0] else layout.rows, piece_m),
            "ALIGNED_N": math.gcd(bn, 0 if are_whole[1] else layout.cols, lanes_n),
            "LEFT_IS_WHOLE": are_whole[0],
            "RIGHT_IS_WHOLE": are_whole[1],
            "LINES_TOGETHER": LINES_TOGETHER,
            "PRECISION": precision,
            "num_warps": sizes.num_warps,
            "num_stages": sizes.num_stages,
        },
    )


def sampled_matmul(left: Tensor, right: Tensor, topology: Topology, offsets: Tensor | None = None) -> Tensor:
    """Computes pack(leftᵀ right) for tiles, as ``ops.plain.sampled_matmul`` defines it."""
    left, right, are_whole = aligned_factors(left, right, topology)
    launch = product_launch(left, topology, are_whole)
    num_tokens, splits = tokens_and_splits(left, topology, launch, offsets)
    out = left.new_empty(*launch.values_shape)
    if out.numel() == 0:
        return out
    parts = out if splits == 1 else left.new_empty(splits, *launch.values_shape, dtype=torch.float32)
    launch.kernel[(launch.num_programs, splits)](
        left,
        right,
        parts,
        *launch.lists,
        offsets,
        topology.num_active,
        num_tokens,
        *launch.sizes,
        *factor_strides(left, right),
        **launch.constants,
    )
    if splits > 1:
        add_splits(parts, out)
    return out


def add_splits(parts: Tensor, out: Tensor) -> None:
    """Writes the sum of ``parts``, first to last, to ``out``."""
    grid = (triton.cdiv(out.numel(), _BLOCK_OF_SUM),)
    kernel = supports.on_device(_add_splits, out.device)
    kernel[grid](parts, out, out.numel(), NUM_SPLITS=len(parts), BLOCK=_BLOCK_OF_SUM)


def factor_strides(left: Tensor, right: Tensor) -> tuple[int, ...]:
    """Returns three strides of each factor: 0 from matrix to matrix where both share one matrix of tokens."""
    strides = left.stride() + right.stride()
    return strides if len(strides) == 6 else (0, *strides[:2], 0, *strides[2:])


def tokens_and_splits(
    left: Tensor, topology: Topology, launch: ProductLaunch, offsets: Tensor | None
) -> tuple[int, int]:
    """Returns the number of tokens, and ``num_splits`` for those of one matrix (an even share of sorted ones)."""
    num_tokens = left.shape[-2]
    key = num_tokens, offsets is None
    splits = launch.splits.get(key)
    if splits is None:
        if len(launch.splits) >= _MOST_LENGTHS:
            launch.splits.clear()
        tokens = num_tokens if offsets is None else num_tokens // topology.layout.num_matrices
        at_once, step = _PROGRAMS_PER_SM * supports.num_sms(left.device), launch.constants["BLOCK_T"]
        splits = num_splits(at_once, topology.layout, tokens, topology.num_active, launch.blocks_together, step)
        launch.splits[key] = splits
    return num_tokens, splits

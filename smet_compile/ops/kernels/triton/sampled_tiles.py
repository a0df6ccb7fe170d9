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

from smet_compile.format import Layout, Topology
from smet_compile.ops.kernels.triton import supports
from smet_compile.ops.kernels.triton.matmul_tiles import dot_precision, multiply_add

_LINES_TOGETHER = 8
_BLOCK_OF_SUM = 1024
_MOST_SPLITS = 16
_COST_OF_A_SPLIT = 1000
"""Multiply-adds that take as long as writing and reading one fp32: some 8 bytes at 3 TB/s, beside 350 T a second."""
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
def lanes_of_block(block, part, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Finds the rows (or columns) of the matrix that piece number ``part`` of a block covers.

    Returns: their offsets within the block, (BLOCK,); their numbers in the matrix, replaced by harmless ones where
    there are none; and whether they are inside both the block and the matrix.
    """
    offset = part * BLOCK + tl.arange(0, BLOCK)
    lane = block * WIDTH + offset
    inside = (offset < WIDTH) & (lane < limit)
    lane = tl.where(inside, lane, offset % ALIGNED)
    return offset, tl.max_contiguous(tl.multiple_of(lane, ALIGNED), ALIGNED), inside


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
    step_T = tl.arange(0, BLOCK_T)
    token_T = (first + step_T).to(tl.int64)
    left_Tm = left + token_T[:, None] * left_stride_t + row_m[None, :].to(tl.int64) * left_stride_r
    right_Tn = right + token_T[:, None] * right_stride_t + col_n[None, :].to(tl.int64) * right_stride_c
    if SWAPPED:
        sum_ = tl.zeros((NUM_N, NUM_M), tl.float32)
    else:
        sum_ = tl.zeros((NUM_M, NUM_N), tl.float32)
    for start in range(first, last, BLOCK_T):
        inside_T = start + step_T < last
        a_Tm = tl.load(left_Tm, mask=inside_T[:, None], other=0.0)
        b_Tn = tl.load(right_Tn, mask=inside_T[:, None], other=0.0)
        if SWAPPED:
            sum_ = multiply_add(tl.trans(b_Tn), a_Tm, sum_, PRECISION)
        else:
            sum_ = multiply_add(tl.trans(a_Tm), b_Tn, sum_, PRECISION)
        left_Tm += BLOCK_T * left_stride_t
        right_Tn += BLOCK_T * right_stride_t
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
        line % block_rows, part // PARTS_N, num_rows, WIDTH_M, BLOCK_M, ALIGNED_M
    )
    lane_n = tl.arange(0, BLOCK_N)
    block_n = first_block + lane_n // LANES_N
    offset_n = part % PARTS_N * BLOCK_N + lane_n % LANES_N
    exists_n = (block_n < end_block) & (offset_n < WIDTH_N)
    across_n = tl.load(positions + tl.minimum(block_n, end_block - 1)) % block_cols
    col_n = (across_n * WIDTH_N + offset_n).to(tl.int32)
    inside_n = exists_n & (col_n < num_cols)
    col_n = tl.where(inside_n, col_n, lane_n % ALIGNED_N)
    col_n = tl.max_contiguous(tl.multiple_of(col_n, ALIGNED_N), ALIGNED_N)

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
    add_splits: Any
    lists: tuple[Tensor | None, Tensor | None]
    sizes: tuple[int, ...]
    num_programs: int
    blocks_together: int
    values_shape: tuple[int, ...]
    splits: dict[tuple[int, bool], int]
    joined: dict[Any, dict[str, Any]]
    constants: dict[str, Any]


def product_launch(left: Tensor, topology: Topology) -> ProductLaunch:
    """Returns the arguments that all products of a ``left`` of this dtype with this topology share."""
    launches: dict[Any, ProductLaunch] = topology.constant("sampled_tiles", dict)
    dtype = left.dtype
    key = dtype, dot_precision(dtype)
    launch = launches.get(key)
    if launch is None:
        launch = launches[key] = _prepare(topology, left, key[1])
    return launch


def _prepare(topology: Topology, left: Tensor, precision: str) -> ProductLaunch:
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
        add_splits=supports.on_device(_add_splits, left.device),
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
            "ALIGNED_M": math.gcd(bm, layout.rows, piece_m),
            "ALIGNED_N": math.gcd(bn, layout.cols, lanes_n),
            "LINES_TOGETHER": _LINES_TOGETHER,
            "PRECISION": precision,
            "num_warps": sizes.num_warps,
            "num_stages": sizes.num_stages,
        },
    )


def sampled_matmul(left: Tensor, right: Tensor, topology: Topology, offsets: Tensor | None = None) -> Tensor:
    """Computes pack(leftᵀ right) for tiles, as ``ops.plain.sampled_matmul`` defines it."""
    launch = product_launch(left, topology)
    num_tokens, splits = tokens_and_splits(left, topology, launch, offsets)
    out = left.new_empty(*launch.values_shape)
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
        grid = (triton.cdiv(out.numel(), _BLOCK_OF_SUM),)
        launch.add_splits[grid](parts, out, out.numel(), NUM_SPLITS=splits, BLOCK=_BLOCK_OF_SUM)
    return out


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
        sms, step = supports.num_sms(left.device), launch.constants["BLOCK_T"]
        splits = num_splits(sms, topology.layout, tokens, topology.num_active, launch.blocks_together, step)
        launch.splits[key] = splits
    return num_tokens, splits


def num_splits(sms: int, layout: Layout, tokens: int, num_active: int, blocks_together: int, step: int) -> int:
    """Returns in how many parts to sum the ``tokens`` of a matrix, so that the estimated time is the least.

    Time is counted in multiply-adds of one output. Programs of ``blocks_together`` blocks run in rounds of two on each
    of the ``sms`` multiprocessors, and each part of a sum has to be written and read.
    """
    bm, bn = layout.block_shape
    lines = min(num_active, layout.num_matrices * layout.block_rows)
    parts_of_block = triton.cdiv(bm, supports.WIDEST) * triton.cdiv(bn, supports.WIDEST)
    programs = parts_of_block * (num_active / blocks_together + lines * (1 - 1 / blocks_together) / 2)
    at_once = _PROGRAMS_PER_SM * sms

    def cost(splits: int) -> float:
        rounds = math.ceil(programs * splits / at_once)
        return rounds * at_once / programs * tokens / splits + (splits > 1) * splits * _COST_OF_A_SPLIT

    most = max(1, min(_MOST_SPLITS, tokens // (4 * step)))
    return min(range(1, most + 1), key=cost)

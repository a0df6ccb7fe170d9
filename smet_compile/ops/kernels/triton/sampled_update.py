"""Joins product and update in one kernel, for tiles: a gradient's blocks are summed in registers, and used there.

Programs and sums are those of ``sampled_tiles``, so that a fused step is, bit for bit, the product and then its update.

Shape suffixes: m and n rows and columns of a program's piece of the gradient, active blocks of one row side by side; k
columns of the part of it that is updated at a time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from smet_compile.ops.kernels.triton import adamw_step as at
from smet_compile.ops.kernels.triton import supports
from smet_compile.ops.kernels.triton.adamw import Launch, launch_of_one, update_all
from smet_compile.ops.kernels.triton.adamw_step import (
    block_key,
    inverse_of,
    is_finite,
    load_moments,
    magnitudes,
    next_moments,
    pointer,
    rates_at,
    rates_of,
    rounded_to,
    scalars,
    scale_of,
    store_step,
    tensors,
)
from smet_compile.ops.kernels.triton.sampled_tiles import (
    ProductLaunch,
    accumulate_tile,
    aligned_factors,
    factor_strides,
    lanes_of_block,
    lanes_of_blocks,
    product_launch,
    sampled_matmul,
    tokens_and_splits,
    tokens_of_split,
)
from smet_compile.ops.updates import Update

_ENTRIES_OF_A_THREAD = 4
"""Entries of a thread that are updated at a time; many more would not fit into registers beside the sums."""


@triton.jit
def _largest_of_block_n(x_n, LANES_N: tl.constexpr):
    """Returns the largest of the LANES_N columns of each block, for each of them."""
    BLOCKS: tl.constexpr = x_n.shape[0] // LANES_N
    largest = tl.max(tl.reshape(x_n, (BLOCKS, LANES_N)), axis=1)
    return tl.reshape(tl.broadcast_to(largest[:, None], (BLOCKS, LANES_N)), (x_n.shape[0],))


@triton.jit
def _columns_of_part(x, part, PARTS: tl.constexpr):
    """Returns consecutive columns, a part of them all."""
    NUM_M: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1] // PARTS
    in_parts = tl.reshape(x, (NUM_M, PARTS, WIDTH))
    wanted = (tl.arange(0, PARTS) == part)[None, :, None]
    return tl.sum(tl.where(wanted, in_parts, tl.zeros_like(in_parts)), axis=1)


@triton.jit
def _vector_part(x_n, part, PARTS: tl.constexpr):
    """Returns ``_columns_of_part`` of one row."""
    WIDTH: tl.constexpr = x_n.shape[0] // PARTS
    in_parts = tl.reshape(x_n, (PARTS, WIDTH))
    wanted = (tl.arange(0, PARTS) == part)[:, None]
    return tl.sum(tl.where(wanted, in_parts, tl.zeros_like(in_parts)), axis=0)


@triton.jit
def _entries(part, first_block, end_block, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, LANES_N: tl.constexpr,
             NUM_M: tl.constexpr, NUM_K: tl.constexpr):  # fmt: skip
    """Returns for a part's lanes the block, the entry within it, and whether there is such an entry."""
    lane_k = part * NUM_K + tl.arange(0, NUM_K)
    row_m = tl.arange(0, NUM_M)
    block_k = lane_k // LANES_N
    within_mk = row_m[:, None] * WIDTH + (lane_k % LANES_N)[None, :]
    exists_k = (lane_k % LANES_N < WIDTH) & (first_block + block_k < end_block)
    return block_k, within_mk, exists_k[None, :] & (row_m < HEIGHT)[:, None]


@triton.jit
def _over_parts(x_k, PARTS: tl.constexpr):
    """Repeats a part's columns for every part: (n,)."""
    NUM_K: tl.constexpr = x_k.shape[0]
    return tl.reshape(tl.broadcast_to(x_k[None, :], (PARTS, NUM_K)), (PARTS * NUM_K,))


@triton.jit
def _update_blocks(
    row,
    rates,
    grad_mn,
    first_block,
    end_block,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES_N: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPES: tl.constexpr,
    INDEX: tl.constexpr,
    GENERATION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Updates blocks from ``first_block`` on, LANES_N columns each, by their gradient, which is 0 beyond an edge."""
    CODED: tl.constexpr = DTYPES[2] == tl.uint8
    NUM_M: tl.constexpr = grad_mn.shape[0]
    NUM_N: tl.constexpr = grad_mn.shape[1]
    NUM_K: tl.constexpr = NUM_N // PARTS
    SIZE: tl.constexpr = HEIGHT * WIDTH
    lane_n = tl.arange(0, NUM_N)
    number_n = first_block + lane_n // LANES_N
    exists_n = number_n < end_block
    broken_n = _largest_of_block_n(tl.max((~is_finite(grad_mn)).to(tl.int32), axis=0), LANES_N)
    leads_n = exists_n & (lane_n % LANES_N == 0)
    num_broken = tl.sum(tl.where(leads_n, broken_n, 0))
    if num_broken > 0:
        tl.atomic_add(pointer(row, at.NUM_SKIPPED, tl.int64), num_broken.to(tl.int64))
    live_n = exists_n & (broken_n == 0)
    values, exp_avg, exp_avg_sq = tensors(row, first_block.to(tl.int64) * SIZE, DTYPES, ALIGNED)
    betas, eps, key = scalars(row)
    positions = pointer(row, at.POSITIONS, INDEX) + first_block
    position_n = tl.load(positions + lane_n // LANES_N, mask=exists_n, other=0)
    old_m_n = tl.zeros((NUM_N,), tl.float32)
    old_v_n = old_m_n
    new_m_n = old_m_n
    new_v_n = old_m_n
    if CODED:
        to_m = pointer(row, at.SCALES, tl.float32)
        to_v = to_m + tl.load(row + at.NUM_GROUPS)
        old_m_n = tl.load(to_m + position_n, mask=exists_n, other=0.0)
        old_v_n = tl.load(to_v + position_n, mask=exists_n, other=0.0)
        for part in range(PARTS):
            block_k, within_mk, mask_mk = _entries(part, first_block, end_block, HEIGHT, WIDTH, LANES_N, NUM_M, NUM_K)
            entry_mk = block_k[None, :] * SIZE + within_mk
            old = _vector_part(old_m_n, part, PARTS)[None, :], _vector_part(old_v_n, part, PARTS)[None, :]
            grad_mk = _columns_of_part(grad_mn, part, PARTS)
            moments = load_moments(exp_avg, exp_avg_sq, entry_mk, mask_mk, old)
            size_m, size_v = magnitudes(next_moments(moments, grad_mk, mask_mk, betas))
            here_n = lane_n // NUM_K == part
            new_m_n = tl.where(here_n, _over_parts(tl.max(size_m, axis=0), PARTS), new_m_n)
            new_v_n = tl.where(here_n, _over_parts(tl.max(size_v, axis=0), PARTS), new_v_n)
        new_m_n = scale_of(_largest_of_block_n(new_m_n, LANES_N))
        new_v_n = scale_of(_largest_of_block_n(new_v_n, LANES_N))
        tl.store(to_m + position_n, new_m_n, mask=leads_n & live_n)
        tl.store(to_v + position_n, new_v_n, mask=leads_n & live_n)
        new_m_n = inverse_of(new_m_n)
        new_v_n = inverse_of(new_v_n)
    rates = rates_of(row, rates)
    generations = pointer(row, at.GENERATION, GENERATION) + first_block
    for part in range(PARTS):
        block_k, within_mk, mask_mk = _entries(part, first_block, end_block, HEIGHT, WIDTH, LANES_N, NUM_M, NUM_K)
        entry_mk = block_k[None, :] * SIZE + within_mk
        exists_k = first_block + block_k < end_block
        old = _vector_part(old_m_n, part, PARTS)[None, :], _vector_part(old_v_n, part, PARTS)[None, :]
        new = _vector_part(new_m_n, part, PARTS)[None, :], _vector_part(new_v_n, part, PARTS)[None, :]
        live_mk = mask_mk & (_vector_part(live_n.to(tl.int32), part, PARTS) > 0)[None, :]
        grad_mk = _columns_of_part(grad_mn, part, PARTS)
        if CODED:
            mask_mk = live_mk
        moments = load_moments(exp_avg, exp_avg_sq, entry_mk, mask_mk, old)
        weight = tl.load(values + entry_mk, mask=mask_mk, other=0.0).to(tl.float32)
        moments = next_moments(moments, grad_mk, live_mk, betas)
        key_k = block_key(key, tl.load(positions + block_k, mask=exists_k, other=0))
        rate = rates_at(rates, tl.load(generations + block_k, mask=exists_k, other=0).to(tl.int32))
        rate = rate[0][None, :], rate[1][None, :], rate[2][None, :]
        store_step(
            values, exp_avg, exp_avg_sq, entry_mk, mask_mk, live_mk, weight, moments, rate, eps, new, key_k[None, :],
            within_mk.to(tl.uint32), STOCHASTIC,
        )  # fmt: skip


@triton.jit
def _sampled_update(
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
    LEFT_IS_WHOLE: tl.constexpr,
    RIGHT_IS_WHOLE: tl.constexpr,
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
    _, row_m, inside_m = lanes_of_block(line % block_rows, 0, num_rows, WIDTH_M, BLOCK_M, ALIGNED_M, LEFT_IS_WHOLE)
    offset_n = tl.arange(0, BLOCK_N) % LANES_N
    first_position = line.to(positions.dtype.element_ty) * block_cols
    _, _, col_n, inside_n = lanes_of_blocks(
        positions, first_block, end_block, first_position, offset_n, num_cols, WIDTH_N, LANES_N, ALIGNED_N,
        RIGHT_IS_WHOLE,
    )  # fmt: skip
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
    _update_blocks(
        table, rates, grad_mn, first_block, end_block, WIDTH_M, WIDTH_N, LANES_N, PARTS, DTYPES, INDEX, GENERATION,
        STOCHASTIC, ALIGNED,
    )  # fmt: skip


def num_parts(rows: int, columns: int, num_warps: int) -> int:
    """Returns in how many parts a piece of the gradient is updated."""
    return max(1, rows * columns // (32 * num_warps * _ENTRIES_OF_A_THREAD))


def sampled_update(left: Tensor, right: Tensor, offsets: Tensor | None, update: Update) -> None:
    """Makes an update by the gradient pack(leftᵀ right) of tiles. ``update.grad`` is only a placeholder for it."""
    topology = update.topology
    assert topology is not None, "tiles are compact"
    if not fuses(left, offsets, update):
        stand_in = update.grad
        update.grad = sampled_matmul(left, right, topology, offsets).to(update.values.dtype)
        try:
            update_all([update])
        finally:
            update.grad = stand_in
        return
    left, right, are_whole = aligned_factors(left, right, topology)
    product = product_launch(left, topology, are_whole)
    launch = launch_of_one(update)
    key = launch.specialization, launch.is_aligned
    constants = product.joined.get(key)
    if constants is None:
        constants = product.joined[key] = _constants(product, launch)
    step = launch.begin([update])
    supports.on_device(_sampled_update, left.device)[(product.num_programs,)](
        step.tables.rows,
        step.rates,
        left,
        right,
        *product.lists,
        offsets,
        left.shape[-2],
        *product.sizes,
        *factor_strides(left, right),
        **constants,
    )
    del step


def fuses(left: Tensor, offsets: Tensor | None, update: Update) -> bool:
    """Tells whether product and update are one kernel: a program holds whole blocks, and the product is not split.

    Args:
        update: the update, whose ``grad`` is only a placeholder.
    """
    topology = update.topology
    if topology is None or not topology.layout.tiles or max(topology.layout.block_shape) > supports.WIDEST:
        return False
    _, splits = tokens_and_splits(left, topology, product_launch(left, topology), offsets)
    return splits == 1


def _constants(product: ProductLaunch, launch: Launch) -> dict[str, Any]:
    constants = product.constants
    return {
        **constants,
        **launch.specialization.constants(),
        "PARTS": num_parts(constants["BLOCK_M"], constants["BLOCK_N"], constants["num_warps"]),
        "ALIGNED": constants["WIDTH_N"] % 16 == 0 and launch.is_aligned,
        "enable_fp_fusion": False,
    }

"""The optimizer's step on a piece of a gradient that is still in registers: active blocks of one row, side by side.

Shape suffixes: m and n rows and columns of the piece, k columns of the part of it that is updated at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smet_compile.ops.kernels.triton import adamw_columns as at
from smet_compile.ops.kernels.triton.adamw_access import grid_of, scalars, tensors
from smet_compile.ops.kernels.triton.adamw_columns import pointer
from smet_compile.ops.kernels.triton.adamw_rounding import is_finite
from smet_compile.ops.kernels.triton.adamw_step import (
    dense_position,
    load_moments,
    magnitudes,
    next_moments,
    store_step,
)


@triton.jit
def largest_of_block_n(x_n, LANES_N: tl.constexpr):
    """The largest of the LANES_N columns of each block, for each of them."""
    BLOCKS: tl.constexpr = x_n.shape[0] // LANES_N
    largest = tl.max(tl.reshape(x_n, (BLOCKS, LANES_N)), axis=1)
    return tl.reshape(tl.broadcast_to(largest[:, None], (BLOCKS, LANES_N)), (x_n.shape[0],))


@triton.jit
def columns_of_part(x, part, PARTS: tl.constexpr):
    """Consecutive columns, a part of them all."""
    NUM_M: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1] // PARTS
    in_parts = tl.reshape(x, (NUM_M, PARTS, WIDTH))
    wanted = (tl.arange(0, PARTS) == part)[None, :, None]
    return tl.sum(tl.where(wanted, in_parts, tl.zeros_like(in_parts)), axis=1)


@triton.jit
def _vector_part(x_n, part, PARTS: tl.constexpr):
    """``columns_of_part`` of one row."""
    WIDTH: tl.constexpr = x_n.shape[0] // PARTS
    in_parts = tl.reshape(x_n, (PARTS, WIDTH))
    wanted = (tl.arange(0, PARTS) == part)[:, None]
    return tl.sum(tl.where(wanted, in_parts, tl.zeros_like(in_parts)), axis=0)


@triton.jit
def _entries(part, first_block, end_block, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, LANES_N: tl.constexpr,
             NUM_M: tl.constexpr, NUM_K: tl.constexpr):  # fmt: skip
    """Of a part's lanes: the block, the entry within it, and whether there is such a one."""
    lane_k = part * NUM_K + tl.arange(0, NUM_K)
    row_m = tl.arange(0, NUM_M)
    block_k = lane_k // LANES_N
    within_mk = row_m[:, None] * WIDTH + (lane_k % LANES_N)[None, :]
    exists_k = (lane_k % LANES_N < WIDTH) & (first_block + block_k < end_block)
    return block_k, within_mk, exists_k[None, :] & (row_m < HEIGHT)[:, None]


@triton.jit
def update_blocks(
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
    """Blocks ``first_block`` and following, LANES_N columns each, by their gradient; what hangs over in it is 0."""
    CODED: tl.constexpr = DTYPES[2] == tl.uint8
    NUM_M: tl.constexpr = grad_mn.shape[0]
    NUM_N: tl.constexpr = grad_mn.shape[1]
    NUM_K: tl.constexpr = NUM_N // PARTS
    SIZE: tl.constexpr = HEIGHT * WIDTH
    lane_n = tl.arange(0, NUM_N)
    number_n = first_block + lane_n // LANES_N
    exists_n = number_n < end_block
    broken_n = largest_of_block_n(tl.max((~is_finite(grad_mn)).to(tl.int32), axis=0), LANES_N)
    leads_n = exists_n & (lane_n % LANES_N == 0)
    num_broken = tl.sum(tl.where(leads_n, broken_n, 0))
    if num_broken > 0:
        tl.atomic_add(pointer(row, at.NUM_SKIPPED, tl.int64), num_broken.to(tl.int64))
    live_n = exists_n & (broken_n == 0)
    values, _, exp_avg, exp_avg_sq = tensors(row, first_block.to(tl.int64) * SIZE, DTYPES, ALIGNED)
    betas, decay, keys = scalars(row)
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
            grad_mk = columns_of_part(grad_mn, part, PARTS)
            moments = load_moments(exp_avg, exp_avg_sq, entry_mk, mask_mk, old)
            size_m, size_v = magnitudes(next_moments(moments, grad_mk, mask_mk, betas))
            here_n = lane_n // NUM_K == part
            new_m_n = tl.where(here_n, _over_parts(tl.max(size_m, axis=0), PARTS), new_m_n)
            new_v_n = tl.where(here_n, _over_parts(tl.max(size_v, axis=0), PARTS), new_v_n)
        new_m_n = largest_of_block_n(new_m_n, LANES_N)
        new_v_n = largest_of_block_n(new_v_n, LANES_N)
        tl.store(to_m + position_n, new_m_n, mask=leads_n & live_n)
        tl.store(to_v + position_n, new_v_n, mask=leads_n & live_n)
    num_generations = tl.load(row + at.NUM_GENERATIONS).to(tl.int32)
    rates += tl.load(row + at.FIRST_RATE)
    generations = pointer(row, at.GENERATION, GENERATION) + first_block
    for part in range(PARTS):
        block_k, within_mk, mask_mk = _entries(part, first_block, end_block, HEIGHT, WIDTH, LANES_N, NUM_M, NUM_K)
        entry_mk = block_k[None, :] * SIZE + within_mk
        exists_k = first_block + block_k < end_block
        old = _vector_part(old_m_n, part, PARTS)[None, :], _vector_part(old_v_n, part, PARTS)[None, :]
        new = _vector_part(new_m_n, part, PARTS)[None, :], _vector_part(new_v_n, part, PARTS)[None, :]
        live_mk = mask_mk & (_vector_part(live_n.to(tl.int32), part, PARTS) > 0)[None, :]
        grad_mk = columns_of_part(grad_mn, part, PARTS)
        if CODED:
            mask_mk = live_mk
        moments = load_moments(exp_avg, exp_avg_sq, entry_mk, mask_mk, old)
        weight = tl.load(values + entry_mk, mask=mask_mk, other=0.0).to(tl.float32)
        moments = next_moments(moments, grad_mk, live_mk, betas)
        position_mk = within_mk.to(tl.int64)
        if STOCHASTIC:
            position_k = tl.load(positions + block_k, mask=exists_k, other=0)
            position_mk = dense_position(position_k[None, :], within_mk, grid_of(row, INDEX))
        rate_k = rates + tl.load(generations + block_k, mask=exists_k, other=0).to(tl.int32)
        rate = tl.load(rate_k), tl.load(rate_k + num_generations), tl.load(rate_k + 2 * num_generations)
        rate = rate[0][None, :], rate[1][None, :], rate[2][None, :]
        store_step(
            values, exp_avg, exp_avg_sq, entry_mk, mask_mk, live_mk, weight, moments, rate, decay, new, keys,
            position_mk, STOCHASTIC,
        )  # fmt: skip


@triton.jit
def _over_parts(x_k, PARTS: tl.constexpr):
    """A part's columns repeated for every part: (n,)."""
    NUM_K: tl.constexpr = x_k.shape[0]
    return tl.reshape(tl.broadcast_to(x_k[None, :], (PARTS, NUM_K)), (PARTS * NUM_K,))

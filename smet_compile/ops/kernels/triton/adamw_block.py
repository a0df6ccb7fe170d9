"""Update of one block, however large, LANES entries at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from smet_compile.ops.kernels.triton import adamw_columns as at
from smet_compile.ops.kernels.triton.adamw_access import grid_of, rates_at, scalars, scale_pointers, tensors
from smet_compile.ops.kernels.triton.adamw_columns import LANES, pointer
from smet_compile.ops.kernels.triton.adamw_rounding import is_finite
from smet_compile.ops.kernels.triton.adamw_step import (
    dense_position,
    load_moments,
    magnitudes,
    next_moments,
    store_step,
)

_SCAN = tl.constexpr(4 * LANES.value)
"""Lanes that look for a gradient that is not finite."""


@triton.jit
def _all_finite(grad_pointer, size):
    """Whether the gradient of a block is; it is read from memory here, and from the cache afterwards."""
    broken = tl.zeros((_SCAN,), tl.int32)
    for start in range(0, size, _SCAN):
        lane = start + tl.arange(0, _SCAN)
        grad = tl.load(grad_pointer + lane, mask=lane < size, other=0.0).to(tl.float32)
        broken |= (~is_finite(grad)).to(tl.int32)
    return tl.max(broken) == 0


@triton.jit
def update_block(
    row,
    rates,
    block,
    DTYPES: tl.constexpr,
    INDEX: tl.constexpr,
    GENERATION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A block, LANES entries at a time; its moments are computed once for their scales, and again for their codes."""
    CODED: tl.constexpr = DTYPES[2] == tl.uint8
    size = tl.load(row + at.BLOCK_SIZE).to(tl.int32)
    if ALIGNED:
        size = size // 16 * 16
    values, grad_pointer, exp_avg, exp_avg_sq = tensors(row, block.to(tl.int64) * size, DTYPES, ALIGNED)
    if not _all_finite(grad_pointer, size):
        tl.atomic_add(pointer(row, at.NUM_SKIPPED, tl.int64), 1)
    else:
        betas, decay, keys = scalars(row)
        block_position = tl.load(pointer(row, at.POSITIONS, INDEX) + block)
        rate = rates_at(row, rates, tl.load(pointer(row, at.GENERATION, GENERATION) + block).to(tl.int32))
        old_scales = 0.0, 0.0
        new_scales = 0.0, 0.0
        if CODED:
            pointers = scale_pointers(row, block_position)
            old_scales = tl.load(pointers[0]), tl.load(pointers[1])
            largest_m = tl.zeros((LANES,), tl.float32)
            largest_v = tl.zeros((LANES,), tl.float32)
            for start in range(0, size, LANES):
                lane = start + tl.arange(0, LANES)
                mask = lane < size
                grad = tl.load(grad_pointer + lane, mask=mask, other=0.0).to(tl.float32)
                moments = load_moments(exp_avg, exp_avg_sq, lane, mask, old_scales)
                size_m, size_v = magnitudes(next_moments(moments, grad, mask, betas))
                largest_m = tl.maximum(largest_m, size_m)
                largest_v = tl.maximum(largest_v, size_v)
            new_scales = tl.max(largest_m), tl.max(largest_v)
            tl.store(pointers[0], new_scales[0])
            tl.store(pointers[1], new_scales[1])
        for start in range(0, size, LANES):
            lane = start + tl.arange(0, LANES)
            mask = lane < size
            grad = tl.load(grad_pointer + lane, mask=mask, other=0.0).to(tl.float32)
            moments = load_moments(exp_avg, exp_avg_sq, lane, mask, old_scales)
            weight = tl.load(values + lane, mask=mask, other=0.0).to(tl.float32)
            moments = next_moments(moments, grad, mask, betas)
            position = lane.to(tl.int64)
            if STOCHASTIC:
                position = dense_position(block_position, lane, grid_of(row, INDEX))
            store_step(
                values, exp_avg, exp_avg_sq, lane, mask, mask, weight, moments, rate, decay, new_scales, keys,
                position, STOCHASTIC,
            )  # fmt: skip

"""What programs of the optimizer take of a parameter's row: pointers, numbers, noise keys, rates."""

from __future__ import annotations

import triton
import triton.language as tl

from smet_compile.ops.kernels.triton import adamw_columns as at
from smet_compile.ops.kernels.triton.adamw_columns import fp32, pointer
from smet_compile.ops.kernels.triton.adamw_step import noise_keys


@triton.jit
def _at(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, first, ALIGNED: tl.constexpr):
    """Pointer to entry ``first`` of a tensor; ALIGNED to 16 bytes."""
    here = pointer(row, COLUMN, DTYPE) + first
    if ALIGNED:
        here = tl.multiple_of(here, 16)
    return here


@triton.jit
def tensors(row, first, DTYPES: tl.constexpr, ALIGNED: tl.constexpr):
    values = _at(row, at.VALUES, DTYPES[0], first, ALIGNED)
    grad = _at(row, at.GRAD, DTYPES[1], first, ALIGNED)
    exp_avg = _at(row, at.EXP_AVG, DTYPES[2], first, ALIGNED)
    exp_avg_sq = _at(row, at.EXP_AVG_SQ, DTYPES[2], first, ALIGNED)
    return values, grad, exp_avg, exp_avg_sq


@triton.jit
def scalars(row):
    betas = fp32(row, at.REST1), fp32(row, at.BETA2), fp32(row, at.REST2)
    decay = fp32(row, at.EPS), fp32(row, at.WEIGHT_DECAY)
    keys = noise_keys(tl.load(row + at.NOISE_SEED), tl.load(pointer(row, at.STEP, tl.int64)))
    return betas, decay, keys


@triton.jit
def grid_of(row, DTYPE: tl.constexpr):
    """What ``dense_position`` wants to know, in the integers of the list of positions."""
    matrix = tl.load(row + at.ROWS), tl.load(row + at.COLS).to(DTYPE)
    blocks = tl.load(row + at.BLOCK_ROWS).to(DTYPE), tl.load(row + at.BLOCK_COLS).to(DTYPE)
    block = tl.load(row + at.BLOCK_HEIGHT).to(tl.int32), tl.load(row + at.BLOCK_WIDTH).to(tl.int32)
    return matrix + blocks + block


@triton.jit
def rates_at(row, rates, number):
    """Step size and bias corrections of generations."""
    num_generations = tl.load(row + at.NUM_GENERATIONS).to(tl.int32)
    rates += tl.load(row + at.FIRST_RATE)
    rate, bias1 = tl.load(rates + number), tl.load(rates + num_generations + number)
    return rate, bias1, tl.load(rates + 2 * num_generations + number)


@triton.jit
def scale_pointers(row, group):
    scales = pointer(row, at.SCALES, tl.float32) + group
    return scales, scales + tl.load(row + at.NUM_GROUPS)

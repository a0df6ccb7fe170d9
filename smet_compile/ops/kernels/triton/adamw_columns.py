"""The table by which one launch updates many parameters: a row of 64-bit numbers for each of them."""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(1024)
"""Entries that a program holds at a time; also the dense weights of a group that shares a scale."""

ENTRIES, BLOCK, BLOCKS, GROUP_OF_WEIGHTS, GROUP_OF_RUNS = map(tl.constexpr, range(5))
"""What a program updates: consecutive entries of a plain parameter or of single weights; one block; several small
blocks; a group of single weights or of runs, which share a scale or a piece of the bitmap."""

NUM_COLUMNS = tl.constexpr(39)
_columns = map(tl.constexpr, range(NUM_COLUMNS.value))
VALUES, GRAD, EXP_AVG, EXP_AVG_SQ, SCALES, NUM_SKIPPED, STEP, LR, GENERATION, BIRTHS, TOPOLOGY, POSITIONS = (
    next(_columns) for _ in range(12)
)
GROUP_STARTS, KIND, ALIGNED, NUMEL, BLOCK_SIZE, ENTRIES_AT_ONCE, NUM_GROUPS, NUM_GENERATIONS, FIRST_RATE = (
    next(_columns) for _ in range(9)
)
NUM_BLOCKS, ROWS, COLS, BLOCK_ROWS, BLOCK_COLS, BLOCK_HEIGHT, BLOCK_WIDTH = (next(_columns) for _ in range(7))
WARMUP_STEPS, SHARED_STEP, NOISE_SEED = (next(_columns) for _ in range(3))
DENSITY_RATE, LOG_BETA1, LOG_BETA2, REST1, BETA2, REST2, EPS, WEIGHT_DECAY = (next(_columns) for _ in range(8))
"""Addresses (an absent tensor's is 0), integers, and the bits of fp64 numbers."""


@triton.jit
def pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))


@triton.jit
def fp64(row, COLUMN: tl.constexpr):
    return tl.load(row + COLUMN).to(tl.float64, bitcast=True)


@triton.jit
def fp32(row, COLUMN: tl.constexpr):
    return fp64(row, COLUMN).to(tl.float32)

"""Makes one AdamW step on the entries that a program holds, in the law's arithmetic and order of operations.

The file has three parts: reading the table, in which one launch finds its parameters; noise, rounding and 8-bit codes;
and the step itself.

Tensors have one element for each entry, in any shape; ``entry`` is its offset from the pointers, ``mask`` tells which
entries exist, ``live`` which of them have a finite gradient. Kernels that call this are compiled without fused
multiply-adds, so that they round as the law does.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LANES = tl.constexpr(1024)
"""Entries that a program holds at a time; also the dense weights of a group that shares a scale."""


class Row(NamedTuple):
    """Holds a parameter's row of the table: addresses (0 for an absent tensor), integers, and the bits of fp64 numbers.

    Args:
        kind: what a program updates, ``ENTRIES`` and so on. aligned: whether the addresses of values, moments and
            generation are multiples of 16. first_rate: the index of its first rate.
        num_blocks: blocks in the dense weight; then follow the sizes of a matrix, of its grid of blocks, of a block.
    """

    values: int
    exp_avg: int
    exp_avg_sq: int
    scales: int
    num_skipped: int
    step: int
    generation: int
    births: int
    topology: int
    positions: int
    group_starts: int
    kind: int
    aligned: int
    numel: int
    block_size: int
    entries_at_once: int
    num_groups: int
    num_generations: int
    first_rate: int
    num_blocks: int
    rows: int
    cols: int
    block_rows: int
    block_cols: int
    block_height: int
    block_width: int
    warmup_steps: int
    initial_warmup_steps: int
    shared_step: int
    noise_seed: int
    density_rate: int
    log_beta1: int
    log_beta2: int
    rest1: int
    beta2: int
    rest2: int
    eps: int
    weight_decay: int


NUM_COLUMNS = tl.constexpr(len(Row._fields))
_columns = map(tl.constexpr, range(NUM_COLUMNS.value))
VALUES, EXP_AVG, EXP_AVG_SQ, SCALES, NUM_SKIPPED, STEP, GENERATION, BIRTHS, TOPOLOGY, POSITIONS, GROUP_STARTS = (
    next(_columns) for _ in range(11)
)
KIND, ALIGNED, NUMEL, BLOCK_SIZE, ENTRIES_AT_ONCE, NUM_GROUPS, NUM_GENERATIONS, FIRST_RATE = (
    next(_columns) for _ in range(8)
)
NUM_BLOCKS, ROWS, COLS, BLOCK_ROWS, BLOCK_COLS, BLOCK_HEIGHT, BLOCK_WIDTH = (next(_columns) for _ in range(7))
WARMUP_STEPS, INITIAL_WARMUP_STEPS, SHARED_STEP, NOISE_SEED = (next(_columns) for _ in range(4))
DENSITY_RATE, LOG_BETA1, LOG_BETA2, REST1, BETA2, REST2, EPS, WEIGHT_DECAY = (next(_columns) for _ in range(8))


class StepRow(NamedTuple):
    """Holds the numbers that may change with every step: the gradient's address, and the rate's address or bits."""

    grad: int
    lr: int
    lr_is_address: int


NUM_STEP_COLUMNS = tl.constexpr(len(StepRow._fields))
GRAD, LR, LR_IS_ADDRESS = map(tl.constexpr, range(NUM_STEP_COLUMNS.value))

ENTRIES, BLOCK, BLOCKS, GROUP_OF_WEIGHTS, GROUP_OF_RUNS = map(tl.constexpr, range(5))
"""Kinds of pieces: consecutive entries of a plain parameter or of single weights; one block; several small blocks; a
group of single weights or of runs, which share a scale or a piece of the bitmap."""

WEIGHT_STREAM, EXP_AVG_STREAM, EXP_AVG_SQ_STREAM = map(tl.constexpr, range(3))
"""Streams of noise."""
EXP_AVG_OFFSET = tl.constexpr(889)
EXP_AVG_SQ_OFFSET = tl.constexpr(761)
"""Offsets of the codes of ``ops.law``, by which code 127, or 255, stands for 1."""
LARGEST = tl.constexpr(3.4028234663852886e38)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))


@triton.jit
def fp64(row, COLUMN: tl.constexpr):
    return tl.load(row + COLUMN).to(tl.float64, bitcast=True)


@triton.jit
def fp32(row, COLUMN: tl.constexpr):
    return fp64(row, COLUMN).to(tl.float32)


@triton.jit
def entries_from(address, first, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns a pointer to entry ``first`` of the tensor at an address; ALIGNED to 16 bytes."""
    here = address.to(tl.pointer_type(DTYPE)) + first
    if ALIGNED:
        here = tl.multiple_of(here, 16)
    return here


@triton.jit
def tensors(row, first, DTYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns pointers to entry ``first`` of the values and both moments."""
    values = entries_from(tl.load(row + VALUES), first, DTYPES[0], ALIGNED)
    exp_avg = entries_from(tl.load(row + EXP_AVG), first, DTYPES[2], ALIGNED)
    return values, exp_avg, entries_from(tl.load(row + EXP_AVG_SQ), first, DTYPES[2], ALIGNED)


@triton.jit
def scalars(row):
    """Returns the numbers of the moments, ε and λ, and the keys of the noise at the step that was just counted."""
    betas = fp32(row, REST1), fp32(row, BETA2), fp32(row, REST2)
    decay = fp32(row, EPS), fp32(row, WEIGHT_DECAY)
    seed, step = tl.load(row + NOISE_SEED), tl.load(pointer(row, STEP, tl.int64))
    moment_keys = noise_key(seed, step, EXP_AVG_STREAM), noise_key(seed, step, EXP_AVG_SQ_STREAM)
    return betas, decay, (noise_key(seed, step, WEIGHT_STREAM), moment_keys[0], moment_keys[1])


@triton.jit
def grid_of(row, DTYPE: tl.constexpr):
    """Returns the sizes that ``dense_position`` takes, in the integers of the list of positions."""
    matrix = tl.load(row + ROWS), tl.load(row + COLS).to(DTYPE)
    blocks = tl.load(row + BLOCK_ROWS).to(DTYPE), tl.load(row + BLOCK_COLS).to(DTYPE)
    block = tl.load(row + BLOCK_HEIGHT).to(tl.int32), tl.load(row + BLOCK_WIDTH).to(tl.int32)
    return matrix + blocks + block


@triton.jit
def rates_at(row, rates, number):
    """Returns step size and bias corrections of generations."""
    num_generations = tl.load(row + NUM_GENERATIONS).to(tl.int32)
    rates += tl.load(row + FIRST_RATE)
    rate, bias1 = tl.load(rates + number), tl.load(rates + num_generations + number)
    return rate, bias1, tl.load(rates + 2 * num_generations + number)


@triton.jit
def scale_pointers(row, group):
    """Returns pointers to the scales of both moments."""
    scales = pointer(row, SCALES, tl.float32) + group
    return scales, scales + tl.load(row + NUM_GROUPS)


@triton.jit
def is_finite(x):
    return tl.abs(x) < _INFINITY


@triton.jit
def hash32(x):
    """Mixes the bits of a uint32, as ``ops.law`` does."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_key(seed, step, STREAM: tl.constexpr):
    """Returns the key of the noise of a step; of ``seed`` and ``step``, integers of any size, the low 32 bits count."""
    return hash32(hash32(hash32(seed.to(tl.uint32)) ^ step.to(tl.uint32)) ^ STREAM)


@triton.jit
def noise_bits(key, position):
    """Returns 32 bits of noise for each dense position (int64)."""
    return hash32(hash32(position.to(tl.uint32) ^ key) ^ (position >> 32).to(tl.uint32))


@triton.jit
def rounded_to(x, noise, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Rounds fp32 to ``DTYPE``: to bf16 by ``noise`` if STOCHASTIC; all else to the nearest, halves to even."""
    if DTYPE.is_bf16():
        bits = x.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            low = noise & 0xFFFF
        else:
            low = ((bits >> 16) & 1) + 0x7FFF
        quiet = tl.where(x != x, 0x400000, 0).to(tl.uint32)
        upper = tl.where(is_finite(x), bits + low, bits | quiet) >> 16
        return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def decode(code, scale, OFFSET: tl.constexpr):
    """Turns uint8 codes into fp32; those of exp_avg have a sign."""
    SIGNED: tl.constexpr = OFFSET == EXP_AVG_OFFSET
    magnitude = code.to(tl.int32)
    if SIGNED:
        magnitude = magnitude & 0x7F
    fraction = ((magnitude + OFFSET) << 20).to(tl.float32, bitcast=True)
    x = tl.where(magnitude == 0, 0.0, scale * fraction)
    if SIGNED:
        x = tl.where(code >= 0x80, -x, x)
    return x


@triton.jit
def encode(x, scale, noise, OFFSET: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Turns fp32 into uint8 codes under ``scale``, the largest magnitude of the group."""
    SIGNED: tl.constexpr = OFFSET == EXP_AVG_OFFSET
    some = scale > 0
    ratio = tl.where(some, tl.div_rn(tl.abs(x), tl.where(some, scale, 1.0)), 0.0)
    low = 0x80000
    if STOCHASTIC:
        low = (noise & 0xFFFFF).to(tl.int32)
    bits = ratio.to(tl.int32, bitcast=True)
    magnitude = ((bits + low) >> 20) - OFFSET
    if SIGNED:
        smallest = tl.cast((tl.zeros_like(bits) + OFFSET + 1) << 20, tl.float32, bitcast=True)
        share = tl.div_rn(ratio, smallest)
        if STOCHASTIC:
            rises = (noise & 0xFFFFF).to(tl.float32) < share * 1048576.0
        else:
            rises = share >= 0.5
        magnitude = tl.where(bits < ((OFFSET + 1) << 20), rises.to(tl.int32), magnitude)
        return (tl.minimum(magnitude, 127) + tl.where(x < 0, 0x80, 0)).to(tl.uint8)
    magnitude = tl.where(magnitude < 1, (x > 0).to(tl.int32), magnitude)
    return tl.minimum(magnitude, 255).to(tl.uint8)


@triton.jit
def dense_position(block, within, row_and_cols):
    """Returns the dense position of entry ``within`` of the block at position ``block`` (of a grid of blocks).

    ``row_and_cols``: rows and columns of a matrix, of its grid of blocks, and of a block.
    """
    rows, cols, block_rows, block_cols, bm, bn = row_and_cols
    line = block // block_cols
    first_row = line // block_rows * rows + line % block_rows * bm
    first_col = block % block_cols * bn
    return (first_row + within // bn).to(tl.int64) * cols + (first_col + within % bn)


@triton.jit
def _load_moment(pointer, entry, mask, scale, OFFSET: tl.constexpr):
    stored = tl.load(pointer + entry, mask=mask, other=0)
    if pointer.dtype.element_ty == tl.uint8:
        return decode(stored, scale, OFFSET)
    else:
        return stored.to(tl.float32)


@triton.jit
def load_moments(exp_avg, exp_avg_sq, entry, mask, scales):
    m = _load_moment(exp_avg, entry, mask, scales[0], EXP_AVG_OFFSET)
    return m, _load_moment(exp_avg_sq, entry, mask, scales[1], EXP_AVG_SQ_OFFSET)


@triton.jit
def next_moments(old, grad, live, betas):
    """Returns both moments after this step; for entries without a gradient those before it."""
    rest1, beta2, rest2 = betas
    m = old[0] + rest1 * (grad - old[0])
    v = beta2 * old[1] + rest2 * grad * grad
    return tl.where(live, m, old[0]), tl.where(live, v, old[1])


@triton.jit
def magnitudes(moments):
    """Returns |m|, and v where a scale can hold it: a scale is the largest of them."""
    return tl.abs(moments[0]), tl.minimum(moments[1], LARGEST)


@triton.jit
def _store(pointer, entry, mask, x, key, position, STOCHASTIC: tl.constexpr):
    DTYPE: tl.constexpr = pointer.dtype.element_ty
    noise = 0
    if STOCHASTIC and DTYPE.is_bf16():
        noise = noise_bits(key, position)
    tl.store(pointer + entry, rounded_to(x, noise, DTYPE, STOCHASTIC), mask=mask)


@triton.jit
def _store_codes(pointer, entry, mask, x, scale, key, position, OFFSET: tl.constexpr, STOCHASTIC: tl.constexpr):
    noise = 0
    if STOCHASTIC:
        noise = noise_bits(key, position)
    tl.store(pointer + entry, encode(x, scale, noise, OFFSET, STOCHASTIC), mask=mask)


@triton.jit
def store_step(
    values, exp_avg, exp_avg_sq, entry, mask, live, weight, moments, rates, decay, scales, keys, position,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Moves ``weight`` by the new moments, and stores all three.

    Entries that are not ``live`` are stored as they were, so that a mask without holes writes many bytes at once:
    rounding does not change a rounded number. It may change a code, so ``mask`` leaves out codes that have to stay.

    ``rates``: step size and bias corrections; ``decay``: ε and λ; ``scales``: of the codes to be written.
    """
    m, v = moments
    rate, bias1, bias2 = rates
    eps, weight_decay = decay
    direction = tl.div_rn(tl.div_rn(m, bias1), tl.sqrt_rn(tl.div_rn(v, bias2)) + eps)
    moved = weight - rate * (direction + weight_decay * weight)
    moved = tl.where(live, moved, weight)
    _store(values, entry, mask, moved, keys[0], position, STOCHASTIC)
    if exp_avg.dtype.element_ty == tl.uint8:
        v = tl.minimum(v, LARGEST)
        _store_codes(exp_avg, entry, mask, m, scales[0], keys[1], position, EXP_AVG_OFFSET, STOCHASTIC)
        _store_codes(exp_avg_sq, entry, mask, v, scales[1], keys[2], position, EXP_AVG_SQ_OFFSET, STOCHASTIC)
    else:
        _store(exp_avg, entry, mask, m, keys[1], position, STOCHASTIC)
        _store(exp_avg_sq, entry, mask, v, keys[2], position, STOCHASTIC)

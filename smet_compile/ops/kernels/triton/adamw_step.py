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
            generation are multiples of 16. first_rate: the index of its first rate. places_start, spans_start: where
            the positions of single weights begin in the lists that each step with noise makes of the bits.
    """

    values: int
    exp_avg: int
    exp_avg_sq: int
    scales: int
    num_skipped: int
    step: int
    generation: int
    births: int
    positions: int
    group_starts: int
    topology: int
    num_blocks: int
    kind: int
    aligned: int
    numel: int
    block_size: int
    entries_at_once: int
    num_groups: int
    num_generations: int
    first_rate: int
    places_start: int
    spans_start: int
    warmup_steps: int
    initial_warmup_steps: int
    shared_step: int
    noise_seed: int
    first_place: int
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
VALUES, EXP_AVG, EXP_AVG_SQ, SCALES, NUM_SKIPPED, STEP, GENERATION, BIRTHS = (next(_columns) for _ in range(8))
POSITIONS, GROUP_STARTS, TOPOLOGY, NUM_BLOCKS = (next(_columns) for _ in range(4))
KIND, ALIGNED, NUMEL, BLOCK_SIZE, ENTRIES_AT_ONCE, NUM_GROUPS, NUM_GENERATIONS = (next(_columns) for _ in range(7))
FIRST_RATE, PLACES_START, SPANS_START = (next(_columns) for _ in range(3))
WARMUP_STEPS, INITIAL_WARMUP_STEPS, SHARED_STEP, NOISE_SEED, FIRST_PLACE = (next(_columns) for _ in range(5))
DENSITY_RATE, LOG_BETA1, LOG_BETA2, REST1, BETA2, REST2, EPS, WEIGHT_DECAY = (next(_columns) for _ in range(8))


class StepRow(NamedTuple):
    """Holds the numbers that may change with every step: the gradient's address, and the rate's address or bits."""

    grad: int
    lr: int
    lr_is_address: int


NUM_STEP_COLUMNS = tl.constexpr(len(StepRow._fields))
GRAD, LR, LR_IS_ADDRESS = map(tl.constexpr, range(NUM_STEP_COLUMNS.value))

ENTRIES, WEIGHTS, BLOCK, BLOCKS, GROUPS_OF_WEIGHTS, GROUP_OF_RUNS = map(tl.constexpr, range(6))
"""Kinds of pieces: consecutive entries of a plain parameter, or of single weights without noise or codes; consecutive
single weights with noise; one block; several small blocks; GROUPS groups of single weights with codes; a group of runs
with codes, which share a scale."""
RATES = tl.constexpr(4)
"""Numbers between the rates of one generation, which are three, and those of the next: a product is a shift."""
GROUPS = tl.constexpr(16)
ENTRIES_OF_A_PIECE = tl.constexpr(4 * LANES.value)

SPAN = tl.constexpr(1 << 16)
"""Consecutive weights whose noise has one key, where they are alone in their blocks."""
_MOMENTS_WORD = tl.constexpr(0x9E3779B9)
"""Tells the hash that serves both moments from that of the weight."""
EXP_AVG_OFFSET = tl.constexpr(889)
EXP_AVG_SQ_OFFSET = tl.constexpr(761)
"""Offsets of the codes of ``ops.law``, by which code 127, or 255, stands for 1."""
_NOISES_OF_SMALLEST = tl.constexpr(65536 / (1.25 / 65536))
"""Number of values of 16 bits of noise, over the smallest signed code above zero."""
_WHOLE, _BITS_OF_WHOLE = tl.constexpr(8388608.0), tl.constexpr(0x4B000000)
"""2^23: fp32 numbers from it on are whole."""
LARGEST, LEAST = tl.constexpr(3.4028234663852886e38), tl.constexpr(1.1754943508222875e-38)
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
    """Returns the numbers of the moments, ε, and the key of the noise at the step that was just counted."""
    betas = fp32(row, REST1), fp32(row, BETA2), fp32(row, REST2)
    key = noise_key(tl.load(row + NOISE_SEED), tl.load(pointer(row, STEP, tl.int64)))
    return betas, fp32(row, EPS), key


@triton.jit
def rates_of(row, rates):
    """Returns a pointer to the parameter's rates, RATES numbers for each generation."""
    return rates + tl.load(row + FIRST_RATE)


@triton.jit
def rates_at(rates, generation):
    """Returns step size, bias correction of the second moment, and decay of generations."""
    here = rates + RATES * generation
    return tl.load(here), tl.load(here + 1), tl.load(here + 2)


@triton.jit
def rates_at_matrix(rates, generation):
    """Does so for a matrix, as for a vector: at scattered addresses Triton 3.6 takes another layout for a matrix."""
    size, unbias2, decay = rates_at(rates, tl.ravel(generation))
    shape: tl.constexpr = generation.shape
    return tl.reshape(size, shape), tl.reshape(unbias2, shape), tl.reshape(decay, shape)


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
def noise_key(seed, step):
    """Returns the key of the noise of a step; of ``seed`` and ``step``, integers of any size, the low 32 bits count."""
    return hash32(hash32(seed.to(tl.uint32)) ^ step.to(tl.uint32))


@triton.jit
def block_key(key, position):
    """Returns the key of the noise of the block at a position, an integer of up to 64 bits."""
    return hash32(hash32(position.to(tl.uint32) ^ key) ^ (position.to(tl.int64) >> 32).to(tl.uint32))


@triton.jit
def noise_of_weight(key, place):
    """Returns 16 bits of noise for the weight at each place (uint32) of the block with this key."""
    return hash32(place ^ key) >> 16


@triton.jit
def noise_of_moments(key, place):
    """Returns 16 bits of noise for each of both moments."""
    both = hash32(place ^ key ^ _MOMENTS_WORD)
    return both & 0xFFFF, both >> 16


@triton.jit
def rounded_to(x, noise, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Rounds fp32 to ``DTYPE``: to bf16 by ``noise`` if STOCHASTIC; all else to the nearest, halves to even."""
    if DTYPE.is_bf16():
        bits = x.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            low = noise
        else:
            low = ((bits >> 16) & 1) + 0x7FFF
        upper = tl.where(x == x, bits + low, 0x7FC00000) >> 16
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
def scale_of(largest):
    """Returns the scale of a group with this largest magnitude."""
    return tl.where(largest > 0, tl.maximum(largest, LEAST), 0.0)


@triton.jit
def inverse_of(scale):
    return tl.where(scale > 0, tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)


@triton.jit
def encode(x, inverse, noise, OFFSET: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Turns fp32 into uint8 codes under the scale with this ``inverse``."""
    SIGNED: tl.constexpr = OFFSET == EXP_AVG_OFFSET
    ratio = tl.abs(x) * inverse
    bits = ratio.to(tl.int32, bitcast=True)
    low = 0x80000 - (OFFSET << 20)
    if STOCHASTIC:
        low = (noise << 4).to(tl.int32) + (8 - (OFFSET << 20))
    magnitude = (bits + low) >> 20
    if SIGNED:
        if STOCHASTIC:
            share = (ratio * _NOISES_OF_SMALLEST + _WHOLE).to(tl.int32, bitcast=True)
            rises = noise.to(tl.int32) + _BITS_OF_WHOLE < share
        else:
            rises = ratio >= 0.625 / 65536
        magnitude = tl.where(bits < ((OFFSET + 1) << 20), rises.to(tl.int32), magnitude)
        return (tl.minimum(magnitude, 127) | tl.where(x < 0, 0x80, 0)).to(tl.uint8)
    magnitude = tl.maximum(magnitude, (x > 0).to(tl.int32))
    return tl.minimum(magnitude, 255).to(tl.uint8)


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
def _store_moments(exp_avg, exp_avg_sq, entry, mask, moments, inverses, noise, STOCHASTIC: tl.constexpr):
    DTYPE: tl.constexpr = exp_avg.dtype.element_ty
    m, v = moments
    if tl.uint8 == DTYPE:
        m = encode(m, inverses[0], noise[0], EXP_AVG_OFFSET, STOCHASTIC)
        v = encode(tl.minimum(v, LARGEST), inverses[1], noise[1], EXP_AVG_SQ_OFFSET, STOCHASTIC)
    else:
        m = rounded_to(m, noise[0], DTYPE, STOCHASTIC)
        v = rounded_to(v, noise[1], DTYPE, STOCHASTIC)
    tl.store(exp_avg + entry, m, mask=mask)
    tl.store(exp_avg_sq + entry, v, mask=mask)


@triton.jit
def store_step(
    values, exp_avg, exp_avg_sq, entry, mask, live, weight, moments, rates, eps, inverses, key, place,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Moves ``weight`` by the new moments, and stores all three.

    Entries that are not ``live`` are stored as they were, so that a mask without holes writes many bytes at once:
    rounding does not change a rounded number. It may change a code, so ``mask`` leaves out codes that have to stay.

    ``rates``: step size, bias correction and decay; ``inverses``: of the scales of codes; ``key``, ``place``: of the
    noise, the keys of blocks and the places (uint32) within them.
    """
    step, unbias2, decay = rates
    move = tl.div_rn(step * moments[0], tl.sqrt_rn(moments[1] * unbias2) + eps) + decay * weight
    moved = tl.where(live, weight - move, weight)
    noise = 0
    if STOCHASTIC and values.dtype.element_ty.is_bf16():
        noise = noise_of_weight(key, place)
    tl.store(values + entry, rounded_to(moved, noise, values.dtype.element_ty, STOCHASTIC), mask=mask)
    noises = 0, 0
    if STOCHASTIC and exp_avg.dtype.element_ty != tl.float32:
        noises = noise_of_moments(key, place)
    _store_moments(exp_avg, exp_avg_sq, entry, mask, moments, inverses, noises, STOCHASTIC)

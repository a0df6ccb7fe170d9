"""One AdamW step on the entries that a program holds, in the reference's arithmetic and order of operations.

Tensors have one element for each entry, in whatever shape; ``entry`` is its offset from the pointers, ``mask`` what
there is of it, ``live`` what has a gradient to go by. Kernels that call this are compiled without fused
multiply-adds, so that they round as the reference does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smet_compile.ops.kernels.triton.adamw_rounding import (
    EXP_AVG,
    EXP_AVG_OFFSET,
    EXP_AVG_SQ,
    EXP_AVG_SQ_OFFSET,
    LARGEST,
    WEIGHT,
    decode,
    encode,
    noise_bits,
    noise_key,
    rounded_to,
)


@triton.jit
def dense_position(block, within, row_and_cols):
    """Position in the dense weight of entry ``within`` of the block at position ``block`` (of a grid of blocks).

    ``row_and_cols``: rows and columns of a matrix, of its grid of blocks, and of a block.
    """
    rows, cols, block_rows, block_cols, bm, bn = row_and_cols
    line = block // block_cols
    first_row = line // block_rows * rows + line % block_rows * bm
    first_col = block % block_cols * bn
    return (first_row + within // bn).to(tl.int64) * cols + (first_col + within % bn)


@triton.jit
def noise_keys(seed, step):
    """Of the weight and its two moments, at the update that makes ``step`` what it is."""
    return noise_key(seed, step, WEIGHT), noise_key(seed, step, EXP_AVG), noise_key(seed, step, EXP_AVG_SQ)


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
    """Both moments after this step; of entries without a gradient those before it."""
    rest1, beta2, rest2 = betas
    m = old[0] + rest1 * (grad - old[0])
    v = beta2 * old[1] + rest2 * grad * grad
    return tl.where(live, m, old[0]), tl.where(live, v, old[1])


@triton.jit
def magnitudes(moments):
    """Of what scales are the largest: |m|, and v where a scale can hold it."""
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

    What is not ``live`` is stored as it was, so that a mask without holes writes many bytes at once: rounding
    leaves alone what has been rounded. Of codes that does not hold; ``mask`` is without those that are to stay.

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

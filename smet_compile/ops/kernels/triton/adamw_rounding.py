"""How weights and moments are stored in few bits: the reference's noise, roundings and 8-bit codes, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

WEIGHT, EXP_AVG, EXP_AVG_SQ = map(tl.constexpr, range(3))
"""Streams of noise."""
EXP_AVG_OFFSET = tl.constexpr(889)
EXP_AVG_SQ_OFFSET = tl.constexpr(761)
"""What a code lacks of the exponent of an fp32 number: code 127, or 255, is 1."""
LARGEST = tl.constexpr(3.4028234663852886e38)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def is_finite(x):
    return tl.abs(x) < _INFINITY


@triton.jit
def hash32(x):
    """The reference's mixer, on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_key(seed, step, STREAM: tl.constexpr):
    """``seed`` and ``step`` are integers of any size, of which the low 32 bits count."""
    return hash32(hash32(hash32(seed.to(tl.uint32)) ^ step.to(tl.uint32)) ^ STREAM)


@triton.jit
def noise_bits(key, position):
    """32 bits for each dense position (int64)."""
    return hash32(hash32(position.to(tl.uint32) ^ key) ^ (position >> 32).to(tl.uint32))


@triton.jit
def rounded_to(x, noise, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """fp32 → ``DTYPE``: to bf16 by ``noise`` if STOCHASTIC; everything else to the nearest, halves to even."""
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
    """uint8 codes → fp32; those of exp_avg have a sign."""
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
    """fp32 → uint8 codes under ``scale``, the largest magnitude of the group."""
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

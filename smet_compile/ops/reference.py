"""The law: each op in plain torch, fp32 or fp64 arithmetic, no tricks. Every faster path must equal this page.

Shape suffixes: N active blocks of B, G generations, S stacked matrices (R, C), T tokens. Values are (N,) for single
weights, (N, bm, bn) for larger blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from smet_compile.format import Layout, pack, unpack

_LOW_32_BITS = 0xFFFFFFFF


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """The dtype arithmetic is done in: fp32 at least, fp64 for fp64."""
    return torch.promote_types(storage, torch.float32)


def hash32(x: Any) -> Any:
    """A 32-bit mixer (xor, shift, multiply, two rounds) of 0 ... 2^32 - 1, a Python int or an int64 tensor."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW_32_BITS
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW_32_BITS
    return x ^ (x >> 16)


def noise_key(seed: int, step: Tensor, stream: int) -> Tensor:
    """One key per (seed of a parameter, step, stream): streams keep a weight and its two moments apart."""
    key: Tensor = hash32(hash32(hash32(seed & _LOW_32_BITS) ^ (step & _LOW_32_BITS)) ^ stream)
    return key


def noise_bits(key: Tensor, positions: Tensor) -> Tensor:
    """32 random bits for each dense position (int64, any size), a pure function of key and position."""
    bits: Tensor = hash32(hash32((positions & _LOW_32_BITS) ^ key) ^ (positions >> 32))
    return bits


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 → bf16: up with the probability of the discarded fraction, by the low 16 of ``bits``. Exact in mean."""
    as_int = x.float().view(torch.int32)
    rounded = ((as_int + (bits & 0xFFFF).int()) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


class AdamWScalars(NamedTuple):
    """What one AdamW step needs beside its tensors."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def step_sizes(age: Tensor, lr: Tensor, density_rate: float, warmup_steps: int) -> Tensor:
    """lr · d^(-p) · min(1, age / W); ``density_rate`` is d^(-p)."""
    warm = (age / warmup_steps).clamp(max=1.0) if warmup_steps else torch.ones_like(age)
    return lr * density_rate * warm


def adamw(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rate: Tensor,
    bias1: Tensor,
    bias2: Tensor,
    scalars: AdamWScalars,
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW step (Loshchilov and Hutter 2019), with step size and bias corrections per block.

    θ ← θ - rate (m̂ / (√v̂ + ε) + λ θ), m̂ = m / bias1, v̂ = v / bias2. All tensors in one dtype, fp32 or fp64;
    ``rate``, ``bias1`` and ``bias2`` broadcast over blocks. Where ε = 0 and a gradient was always 0, the step is 0,
    not 0 / 0: what hangs over an edge stays zero. Returns the new weight and moments.
    """
    eps = max(scalars.eps, torch.finfo(weight.dtype).tiny)
    exp_avg = exp_avg + (1 - scalars.beta1) * (grad - exp_avg)
    exp_avg_sq = scalars.beta2 * exp_avg_sq + (1 - scalars.beta2) * grad * grad
    direction = (exp_avg / bias1) / ((exp_avg_sq / bias2).sqrt() + eps)
    return weight - rate * (direction + scalars.weight_decay * weight), exp_avg, exp_avg_sq


def finite_blocks(grad: Tensor, num_block_dims: int) -> Tensor:
    """Mask that broadcasts over ``grad``: the whole block's gradient is finite. 0 block dims: single weights."""
    finite = grad.isfinite()
    return finite.all(-1, keepdim=True).all(-2, keepdim=True) if num_block_dims else finite


def per_block(table_G: Tensor, generation: Tensor | None, like: Tensor) -> Tensor:
    """Looks up each block's generation in a table, shaped to broadcast over ``like``. No generations: the scalar."""
    table_G = table_G.to(like.dtype)
    if generation is None:
        return table_G
    return table_G.index_select(0, generation.int()).view(-1, *[1] * (like.dim() - 1))


def spread_over_matrices(tokens_TX: Tensor, offsets_S: Tensor) -> Tensor:
    """Tokens sorted by matrix → (S, T, X): each token in its matrix's layer, zeros in the others.

    Matrix s has the rows ``offsets_S[s - 1]`` to ``offsets_S[s]``; rows past the last offset are nobody's.
    """
    number_T = torch.arange(tokens_TX.shape[0], device=tokens_TX.device)
    ends_S1 = offsets_S[:, None]
    starts_S1 = torch.cat((torch.zeros_like(ends_S1[:1]), ends_S1[:-1]))
    mine_ST = (starts_S1 <= number_T) & (number_T < ends_S1)
    return torch.where(mine_ST[..., None], tokens_TX, 0)


def masked_matmul(
    input: Tensor,
    values: Tensor,
    mask_B: Tensor,
    layout: Layout,
    transposed: bool,
    bias: Tensor | None = None,
    offsets_S: Tensor | None = None,
) -> Tensor:
    """input W + bias, or input Wᵀ + bias. Of a stack: matrix by matrix, or each token with its own one."""
    weight_SRC = unpack(values, mask_B, layout).view(-1, *layout.matrix)
    layers = input if offsets_S is None else spread_over_matrices(input, offsets_S)
    product = layers @ (weight_SRC.mT if transposed else weight_SRC)
    out = product.view(*input.shape[:-1], product.shape[-1]) if offsets_S is None else product.sum(0)
    return out if bias is None else out + bias


def sampled_matmul(
    left: Tensor, right: Tensor, mask_B: Tensor, layout: Layout, offsets_S: Tensor | None = None
) -> Tensor:
    """pack(leftᵀ right). Of a stack: matrix by matrix, or each with its own tokens."""
    if offsets_S is not None:
        left, right = spread_over_matrices(left, offsets_S), spread_over_matrices(right, offsets_S)
    return pack((left.mT @ right).view(layout.shape), mask_B, layout)

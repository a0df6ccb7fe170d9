"""Defines the law: the reference of each op, in plain torch with fp32 or fp64 arithmetic. Kernels must equal it.

It also defines the noise of stochastic rounding and 8-bit codes. Noise is a pure function of seed, step, the position
of a block in the dense weight, an entry's place within the block, and a stream: weight and slots have one each. A code
is an 8-bit float relative to ``scale``, the largest magnitude of its group: a magnitude c > 0 stands for ``scale``
times the fp32 number whose upper bits are c + offset (3 bits of mantissa, the exponent above). The code 0 is zero, and
the largest c is ``scale`` itself.

Shape suffixes: N active blocks, G generations, S stacked matrices (R, C), T tokens. Values are (N,) for single
weights, (N, bm, bn) for larger blocks.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smet_compile.format import WEIGHTS_OF_A_GROUP, Layout, Topology, blocks

_LOW_32_BITS = 0xFFFFFFFF
_WORD = 0x9E3779B9
"""A multiple of it, modulo 2^32, tells the hashes of an entry apart: its bits have no pattern (2^32 over the golden
ratio), and it is far larger than any place, so that two of a block's hashes are never of one number."""
SPAN = 1 << 16
"""Number of consecutive weights whose noise has one key, where they are alone in their blocks."""


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """Returns the dtype in which arithmetic is done: fp32 at least, fp64 for fp64."""
    return torch.promote_types(storage, torch.float32)


def hash32(x: Any) -> Any:
    """Mixes 32 bits (xor, shift, multiply, two rounds); ``x`` is a Python int or an int64 tensor of 0 ... 2^32 - 1."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW_32_BITS
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW_32_BITS
    return x ^ (x >> 16)


def noise_key(seed: int, step: Tensor) -> Tensor:
    """Returns the key of the noise of one parameter in one step."""
    key: Tensor = hash32(hash32(seed & _LOW_32_BITS) ^ (step & _LOW_32_BITS))
    return key


def block_keys(key: Tensor, blocks: Tensor) -> Tensor:
    """Returns the key of each block's noise; ``blocks`` are positions (int64) in the dense weight."""
    keys: Tensor = hash32(hash32((blocks & _LOW_32_BITS) ^ key) ^ (blocks >> 32))
    return keys


def noise_bits(block_keys: Tensor, places: Tensor, stream: int) -> Tensor:
    """Returns 16 pseudorandom bits for each place (int64, below 2^32) within its block; both tensors broadcast.

    The weight's stream is 0; slot k has the stream k + 1. One hash serves two slots, its halves being independent.
    """
    word, half = (stream + 1) // 2, (stream + 1) % 2
    bits: Tensor = hash32(places ^ block_keys ^ (word * _WORD & _LOW_32_BITS))
    return bits >> 16 * half & 0xFFFF


def round_stochastic(x: Tensor, noise: Tensor) -> Tensor:
    """Rounds fp32 to bf16, away from zero with the probability of the discarded fraction, by 16 bits of ``noise``."""
    rounded = ((x.float().view(torch.int32) + noise.int()) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


def warmup_of(births: Tensor | None, warmup_steps: int, initial_warmup_steps: int) -> Tensor | int:
    """Returns W of each generation: that of the initial blocks for one born at step 0; a number where all are alike."""
    if births is None or warmup_steps == initial_warmup_steps:
        return initial_warmup_steps
    return torch.where(births == 0, initial_warmup_steps, warmup_steps)


def step_sizes(age: Tensor, lr: Tensor, density_rate: float, warmup_steps: Tensor | int) -> Tensor:
    """Returns lr · d^(-p) · min(1, age / W), which is 1 for W = 0; ``density_rate`` is d^(-p)."""
    if isinstance(warmup_steps, int) and not warmup_steps:
        return lr * density_rate * torch.ones_like(age)
    return lr * density_rate * (age / warmup_steps).clamp(max=1.0)


def finite_blocks(grad: Tensor, num_block_dims: int) -> Tensor:
    """Returns a mask that broadcasts over ``grad``: all entries of a block are finite. Single weights have 0 dims."""
    finite = grad.isfinite()
    return finite.all(-1, keepdim=True).all(-2, keepdim=True) if num_block_dims else finite


def per_block(table_G: Tensor, generation: Tensor | None, like: Tensor) -> Tensor:
    """Looks up each block's generation in a table, to broadcast over ``like``; the table where blocks have no age."""
    table_G = table_G.to(like.dtype)
    if generation is None:
        return table_G
    return table_G.index_select(0, generation.int()).view(-1, *[1] * (like.dim() - 1))


def scale_rows(grad: Tensor, topology: Topology, in_place: bool = False) -> Tensor:
    """Returns the gradient with each row times √(k / k̄), k being the row's fan-in and k̄ the mean over the rows.

    ``in_place`` allows a kernel to write the result over the gradient.
    """
    layout, dtype = topology.layout, compute_dtype(grad.dtype)
    matrices_SRC = layout.num_matrices, *layout.matrix
    fan_in_SR = unpack(torch.ones_like(grad, dtype=dtype), topology).view(matrices_SRC).sum(2)
    factor_SR = (fan_in_SR / fan_in_SR.mean()).sqrt()
    dense_SRC = unpack(grad.to(dtype), topology).view(matrices_SRC) * factor_SR[..., None]
    return pack(dense_SRC.view(layout.shape), topology).to(grad.dtype)


def spread_over_matrices(tokens_TX: Tensor, offsets_S: Tensor) -> Tensor:
    """Returns tokens sorted by matrix as (S, T, X): layer s has the tokens of matrix s, and zeros for the others.

    Matrix s has the rows ``offsets_S[s - 1]`` to ``offsets_S[s]``; rows past the last offset belong to none.
    """
    number_T = torch.arange(tokens_TX.shape[0], device=tokens_TX.device)
    ends_S1 = offsets_S[:, None]
    starts_S1 = torch.cat((torch.zeros_like(ends_S1[:1]), ends_S1[:-1]))
    mine_ST = (starts_S1 <= number_T) & (number_T < ends_S1)
    return torch.where(mine_ST[..., None], tokens_TX, 0)


def unpack(values: Tensor, topology: Topology) -> Tensor:
    """Returns the dense weight of ``values``: zero where no block is active."""
    return blocks.unpack(values, topology.mask(), topology.layout)


def pack(dense: Tensor, topology: Topology) -> Tensor:
    """Returns the active blocks of ``dense``, in row-major order of position."""
    return blocks.pack(dense, topology.mask(), topology.layout)


def masked_matmul(
    input: Tensor,
    values: Tensor,
    topology: Topology,
    transposed: bool,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Returns input W + bias, or input Wᵀ + bias where ``transposed``, W being the unpacked weight.

    A stack is multiplied matrix by matrix. With ``offsets`` (S,) int32, tokens are sorted by matrix and each is
    multiplied with its own: those of matrix s end before row ``offsets[s]``.
    """
    dtype = compute_dtype(input.dtype)
    weight_SRC = unpack(values.to(dtype), topology).view(-1, *topology.layout.matrix)
    exact = input.to(dtype)
    layers = exact if offsets is None else spread_over_matrices(exact, offsets)
    product = layers @ (weight_SRC.mT if transposed else weight_SRC)
    out = product.view(*input.shape[:-1], product.shape[-1]) if offsets is None else product.sum(0)
    return (out if bias is None else out + bias.to(dtype)).to(input.dtype)


def sampled_matmul(left: Tensor, right: Tensor, topology: Topology, offsets: Tensor | None = None) -> Tensor:
    """Returns pack(leftᵀ right); for a stack matrix by matrix, with ``offsets`` each matrix with its own tokens."""
    dtype = compute_dtype(left.dtype)
    left_, right_ = left.to(dtype), right.to(dtype)
    if offsets is not None:
        left_, right_ = spread_over_matrices(left_, offsets), spread_over_matrices(right_, offsets)
    return pack((left_.mT @ right_).view(topology.layout.shape), topology).to(left.dtype)


_DISCARDED = 20
"""Number of low bits of an fp32 number that its code drops."""
_HALF = 1 << (_DISCARDED - 1)
_NUM_NOISES = 1 << 16
_BELOW_NOISE = 4
"""Number of low bits of the discarded fraction to which noise of 16 bits does not reach. Half of their unit is added
instead, so that a number within it of a code becomes that code, whatever the noise."""


class CodeFormat(NamedTuple):
    """Describes how a magnitude relative to the scale becomes a code of ``0 ... largest``, with a sign or without."""

    offset: int
    largest: int
    signed: bool

    @property
    def smallest(self) -> float:
        """Returns the smallest number above zero that a code stands for, relative to the scale."""
        bits = struct.pack("<i", (1 + self.offset) << _DISCARDED)
        return float(struct.unpack("<f", bits)[0])


SIGNED_CODES = CodeFormat(889, 127, signed=True)
"""A sign, four bits of exponent, three of mantissa: from the scale down to 2^-16 of it, and zero."""
UNSIGNED_CODES = CodeFormat(761, 255, signed=False)
"""Five bits of exponent, three of mantissa: down to 2^-32 of the scale, the square of a signed code's range."""


def num_scales(num_weights: int, layout: Layout | None) -> int:
    """Counts the groups of a compact weight with this layout, or of a plain parameter, where 1024 entries share one."""
    return layout.num_groups if layout else -(-num_weights // WEIGHTS_OF_A_GROUP)


def decode(codes: Tensor, scales: Tensor, kind: CodeFormat) -> Tensor:
    """Converts uint8 codes to fp32; ``scales`` broadcasts over them."""
    magnitude = codes.int() & kind.largest
    size = ((magnitude + kind.offset) << _DISCARDED).view(torch.float32)
    size = torch.where(magnitude > 0, scales * size, 0.0)
    return torch.where(codes > kind.largest, -size, size) if kind.signed else size


def scales_of(largest: Tensor) -> Tensor:
    """Returns the scales of groups with these largest magnitudes: the same, but at least the least normal number or 0.

    The inverse of any other scale is finite, so that encoding multiplies by it.
    """
    return torch.where(largest > 0, largest.clamp(min=torch.finfo(largest.dtype).tiny), 0.0)


def encode(moment: Tensor, scales: Tensor, kind: CodeFormat, noise: Tensor | None) -> Tensor:
    """Converts fp32 to uint8 codes; ``scales`` are those of the entries' groups, from ``scales_of``.

    Rounds up with the probability of the discarded fraction, to the nearest multiple of 2^-16, by 16 bits of ``noise``;
    to nearest where that is None. A signed moment below the smallest code is rounded to it or to zero in the same way.
    An unsigned one (a mean of squares, whose root is a divisor) is rounded up to it, so that only zero becomes 0.
    """
    fraction = _HALF if noise is None else (noise.int() << _BELOW_NOISE) + (1 << _BELOW_NOISE - 1)
    ratio = moment.abs() * torch.where(scales > 0, 1 / scales, 0.0)
    bits = ratio.view(torch.int32)
    magnitude = (((bits + fraction) >> _DISCARDED) - kind.offset).clamp(max=kind.largest)
    if not kind.signed:
        return torch.maximum(magnitude, (moment > 0).int()).to(torch.uint8)
    below = bits < (1 + kind.offset) << _DISCARDED
    magnitude = torch.where(below, _one_or_zero(ratio, kind.smallest, noise), magnitude)
    return torch.where(moment < 0, magnitude + kind.largest + 1, magnitude).to(torch.uint8)


def _one_or_zero(ratio: Tensor, smallest: float, noise: Tensor | None) -> Tensor:
    """Returns 1 with the probability ratio / smallest, else 0; without noise 1 from a half on."""
    if noise is None:
        return (ratio >= smallest / 2).int()
    return (noise < (ratio * (_NUM_NOISES / smallest)).round()).int()


class Groups(NamedTuple):
    """Holds the groups of codes that some rows of a parameter belong to. A group shares a scale.

    Args:
        numbers: (g,) int64, the indices of their scales.
        of_block: int64, the index into ``numbers`` of each block's group; broadcasts over the rows.
    """

    numbers: Tensor
    of_block: Tensor

    def spread(self, per_group: Tensor) -> Tensor:
        """Returns each block's element of a tensor (g,), to broadcast over the rows."""
        return per_group[self.of_block]

    def largest(self, entries: Tensor) -> Tensor:
        """Returns (g,) the largest of each group's entries, which are not negative; 0 for a group without any."""
        per_block = entries if entries.shape == self.of_block.shape else entries.amax((1, 2))
        zeros = torch.zeros_like(self.numbers, dtype=entries.dtype)
        return zeros.scatter_reduce_(0, self.of_block.reshape(-1), per_block.reshape(-1), "amax")

"""Computes masked_matmul for tiles: input W and input Wᵀ, of which only the active blocks are multiplied.

A program makes the outputs of some tokens at one line of blocks (a block row for input Wᵀ, a block column for
input W), or at a part of a wide line. It sums over one axis: the widths of the line's active blocks, one after
another, taken ``BLOCK_I`` at a time, be that a part of a block or several. So narrow blocks feed the tensor cores as
wide ones do, and loads of one block are under way while another is multiplied.

Programs are ordered (group of tokens, line, tokens in the group), the last fastest. Those that run together share the
group's inputs, a few MB, and the weights of the lines they are at: both stay in the L2 cache, and the input comes from
memory once. Lines are uneven, but thousands of programs start one by one wherever another ends: only at the very end
does a multiprocessor wait, for at most one longest line of hundreds.

Shape suffixes: T tokens, I and O inputs and outputs of the product, k those of them that one step sums over.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from smet_compile.format import Topology
from smet_compile.ops.kernels.triton import supports
from smet_compile.ops.torch_insides import fp32_precision

_INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
_HALF = (torch.bfloat16, torch.float16)
_TOKENS_TOGETHER = 2048
"""Tokens of a group: with 4096 inputs in bf16 they are 16 MB, of the 50 MB (Ampere: 40) of the L2 cache."""


@triton.jit
def multiply_add(a, b, sum_, PRECISION: tl.constexpr):
    """Computes a b + sum in fp32, for every kernel of a product.

    "ieee": factors as fp32, on plain cores. "tf32": on tensor cores, fp32 factors rounded to tf32.
    """
    if PRECISION == "ieee":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum_, input_precision=PRECISION)


def dot_precision(dtype: torch.dtype) -> str:
    """Returns ``PRECISION`` for factors of ``dtype``, by torch's setting for fp32; the interpreter has plain cores."""
    if _INTERPRETED:
        return "ieee"
    return "tf32" if dtype in _HALF or fp32_precision() == "tf32" else "ieee"


@triton.jit
def _one_block(positions, by_column, first_block, num_blocks, place, block_rows, block_cols, TRANSPOSED: tl.constexpr):
    """Returns the row of ``values`` of the block at ``place`` in a line, and its block column (or block row)."""
    exists = place < num_blocks
    block = first_block + tl.where(exists, place, 0)
    if not TRANSPOSED:
        block = tl.load(by_column + block, mask=exists, other=0)
    position = tl.load(positions + block, mask=exists, other=0)
    across = position % block_cols if TRANSPOSED else position // block_cols % block_rows
    return block, across


@triton.jit
def _blocks_of_step(
    positions,
    by_column,
    first_block,
    num_blocks,
    start,
    block_rows,
    block_cols,
    PADDED_I: tl.constexpr,
    BLOCK_I: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Returns ``_one_block`` for a step: scalars where it takes a part of one, else (BLOCK_I,)."""
    place = start // PADDED_I
    block, across = _one_block(positions, by_column, first_block, num_blocks, place, block_rows, block_cols, TRANSPOSED)
    if PADDED_I < BLOCK_I:
        number_k = tl.arange(0, BLOCK_I) // PADDED_I
        for number in tl.static_range(1, BLOCK_I // PADDED_I):
            other, other_across = _one_block(
                positions, by_column, first_block, num_blocks, place + number, block_rows, block_cols, TRANSPOSED
            )
            block = tl.where(number_k >= number, other, block)
            across = tl.where(number_k >= number, other_across, across)
    return block, across


@triton.jit
def _group_of_tokens(offsets, number, num_tokens, NUM_GROUPS: tl.constexpr, LANES: tl.constexpr, BLOCK_T: tl.constexpr):
    """Returns matrix, first token and end of block ``number`` of tokens sorted by matrix, as ``offsets`` (S,) say.

    Each group is cut into blocks for itself. Tokens past the last offset are the group of matrix S, which there is not.
    """
    group = tl.arange(0, LANES)
    end = tl.load(offsets + group, mask=group < NUM_GROUPS, other=num_tokens)
    begin = tl.load(offsets + group - 1, mask=(group > 0) & (group <= NUM_GROUPS), other=0)
    begin = tl.where(group > NUM_GROUPS, num_tokens, begin)
    num_blocks = (end - begin + BLOCK_T - 1) // BLOCK_T
    blocks_until = tl.cumsum(num_blocks, 0)
    mine = (blocks_until - num_blocks <= number) & (number < blocks_until)
    matrix = tl.sum(tl.where(mine, group, 0))
    within = number - tl.sum(tl.where(mine, blocks_until - num_blocks, 0))
    first = tl.sum(tl.where(mine, begin, 0)) + within * BLOCK_T
    return matrix, first, tl.sum(tl.where(mine, end, 0))


@triton.jit
def _masked_tiles(
    input,
    values,
    bias,
    out,
    positions,
    by_column,
    line_starts,
    offsets,
    num_tokens,
    num_inputs,
    num_outputs,
    block_rows,
    block_cols,
    stride_s,
    stride_t,
    stride_i,
    TRANSPOSED: tl.constexpr,
    NUM_MATRICES: tl.constexpr,
    LANES_S: tl.constexpr,
    WIDTH_I: tl.constexpr,
    WIDTH_O: tl.constexpr,
    PADDED_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    ALIGNED_I: tl.constexpr,
    ALIGNED_W: tl.constexpr,
    MASKED: tl.constexpr,
    TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PARTS: tl.constexpr = (WIDTH_O + BLOCK_O - 1) // BLOCK_O
    lines_of_matrix = block_rows if TRANSPOSED else block_cols
    # Program → (matrix, group of tokens, line and part of it, tokens in the group).
    program = tl.program_id(0)
    num_token_blocks = tl.num_programs(0) // (lines_of_matrix * PARTS)
    first_of_group = program // (TOGETHER * lines_of_matrix * PARTS) * TOGETHER
    together = tl.minimum(TOGETHER, num_token_blocks - first_of_group)
    in_group = program % (TOGETHER * lines_of_matrix * PARTS)
    token_block = first_of_group + in_group % together
    line_part = in_group // together
    line, part = line_part // PARTS, line_part % PARTS
    if offsets is not None:
        matrix, first, end = _group_of_tokens(offsets, token_block, num_tokens, NUM_MATRICES, LANES_S, BLOCK_T)
        if first >= end:
            return
        input_s, out_s = input, out
    else:
        matrix = tl.program_id(1)
        first, end = token_block * BLOCK_T, num_tokens
        input_s = input + matrix.to(tl.int64) * stride_s
        out_s = out + matrix.to(tl.int64) * num_tokens * num_outputs

    token_T = first + tl.arange(0, BLOCK_T)
    inside_T = token_T < end
    # Tokens past the end read the last one's input and store nothing. Offsets are of 32 bits, half the registers.
    input_s += first.to(tl.int64) * stride_t
    input_T = (tl.minimum(token_T, end - 1) - first) * stride_t
    offset_O = part * BLOCK_O + tl.arange(0, BLOCK_O)
    in_block_O = offset_O < WIDTH_O
    weight_O = offset_O
    if WIDTH_O % BLOCK_O != 0:
        weight_O = tl.where(in_block_O, offset_O, 0)
    step_k = tl.arange(0, BLOCK_I)

    has_blocks = matrix < NUM_MATRICES
    starts = line_starts + matrix * lines_of_matrix + line
    first_block = tl.load(starts, mask=has_blocks, other=0)
    num_blocks = (tl.load(starts + 1, mask=has_blocks, other=0) - first_block).to(tl.int32)
    length = num_blocks * PADDED_I
    sum_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    # The index is read a step ahead, so that loads of weights and inputs wait for nothing.
    block, across = _blocks_of_step(
        positions, by_column, first_block, num_blocks, 0, block_rows, block_cols, PADDED_I, BLOCK_I, TRANSPOSED
    )
    for start in range(0, length, BLOCK_I):
        next_block, next_across = _blocks_of_step(
            positions,
            by_column,
            first_block,
            num_blocks,
            start + BLOCK_I,
            block_rows,
            block_cols,
            PADDED_I,
            BLOCK_I,
            TRANSPOSED,
        )
        in_block_k = (start + step_k) % PADDED_I
        in_block_k = tl.max_contiguous(tl.multiple_of(in_block_k, ALIGNED_W), ALIGNED_W)
        if TRANSPOSED:
            weight_kO = in_block_k[:, None] + weight_O[None, :] * WIDTH_I
        else:
            weight_kO = in_block_k[:, None] * WIDTH_O + weight_O[None, :]
        values_of_block = values + block.to(tl.int64) * (WIDTH_I * WIDTH_O)
        if PADDED_I < BLOCK_I:
            values_of_block = values_of_block[:, None]
        weight_kO = values_of_block + weight_kO
        input_k = (across * WIDTH_I).to(tl.int32) + in_block_k
        input_k = tl.max_contiguous(tl.multiple_of(input_k, ALIGNED_I), ALIGNED_I)
        input_Tk = input_s + (input_T[:, None] + input_k[None, :] * stride_i)
        if MASKED:
            inside_k = (start + step_k < length) & (in_block_k < WIDTH_I) & (input_k < num_inputs)
            a_Tk = tl.load(input_Tk, mask=inside_k[None, :], other=0.0)
            b_kO = tl.load(weight_kO, mask=inside_k[:, None], other=0.0)
        else:
            a_Tk = tl.load(input_Tk)
            b_kO = tl.load(weight_kO)
        sum_TO = multiply_add(a_Tk, b_kO, sum_TO, PRECISION)
        block, across = next_block, next_across

    output_O = line * WIDTH_O + offset_O
    inside_O = in_block_O & (output_O < num_outputs)
    if bias is not None:
        sum_TO += tl.load(bias + output_O, mask=inside_O, other=0.0).to(tl.float32)[None, :]
    to_TO = out_s + token_T[:, None].to(tl.int64) * num_outputs + output_O[None, :]
    tl.store(to_TO, sum_TO.to(out.dtype.element_ty), mask=inside_T[:, None] & inside_O[None, :])


class _Launch(NamedTuple):
    """Holds the arguments that all launches with one topology share.

    Args:
        lists: positions, order by column, starts of the lines. sizes: the kernel's arguments after ``num_tokens``.
        programs: programs for a block of tokens. tokens: tokens of a program. more_blocks: additional blocks of tokens,
            since each matrix begins a new one. num_inputs, num_outputs: sizes of the product.
    """

    kernel: Any
    lists: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    programs: int
    tokens: int
    more_blocks: int
    stack: int
    num_inputs: int
    num_outputs: int
    constants: dict[str, Any]


def masked_matmul(
    input: Tensor,
    values: Tensor,
    topology: Topology,
    transposed: bool,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Computes input W or input Wᵀ for tiles, plus bias, as ``ops.plain.masked_matmul`` defines it."""
    shape, dtype = input.shape, input.dtype
    is_stack = len(shape) == 3
    launches: dict[Any, _Launch] = topology.constant("masked_tiles", dict)
    key = transposed, dtype, dot_precision(dtype), is_stack, offsets is None
    launch = launches.get(key)
    if launch is None:
        launch = launches[key] = _prepare(topology, input, transposed, is_sorted=offsets is not None)
    if is_stack:
        num_matrices, num_tokens, _ = shape
        out = input.new_empty(num_matrices, num_tokens, launch.num_outputs)
        strides = input.stride()
    else:
        num_tokens, _ = shape
        out = input.new_empty(num_tokens, launch.num_outputs)
        strides = (0, *input.stride())
    num_programs = (-(-num_tokens // launch.tokens) + launch.more_blocks) * launch.programs
    if num_tokens == 0 or num_programs == 0:
        return out
    if launch.num_inputs * strides[2] + _TOKENS_TOGETHER * strides[1] >= 2**31:
        input = input.contiguous()  # offsets within a program are of 32 bits
        strides = (num_tokens * launch.num_inputs, launch.num_inputs, 1)
    launch.kernel[(num_programs, launch.stack)](
        input,
        values.contiguous(),
        bias,
        out,
        *launch.lists,
        offsets,
        num_tokens,
        *launch.sizes,
        *strides,
        **launch.constants,
    )
    return out


def _prepare(topology: Topology, input: Tensor, transposed: bool, is_sorted: bool) -> _Launch:
    layout, precision = topology.layout, dot_precision(input.dtype)
    (num_outputs, num_inputs), (width_o, width_i) = layout.matrix, layout.block_shape
    if not transposed:
        num_outputs, num_inputs, width_o, width_i = num_inputs, num_outputs, width_i, width_o
    sizes = supports.masked_sizes(input.device, input.dtype, precision, width_o)
    inner, padded_i = supports.inner_step(width_i, sizes.inner)
    block_o = supports.lanes(width_o)
    starts = topology.row_starts if transposed else topology.column_starts
    return _Launch(
        kernel=supports.on_device(_masked_tiles, input.device),
        lists=(topology.positions, topology.by_column, starts),
        sizes=(num_inputs, num_outputs, layout.block_rows, layout.block_cols),
        programs=triton.cdiv(num_outputs, width_o) * triton.cdiv(width_o, block_o),
        tokens=sizes.tokens,
        more_blocks=layout.num_matrices if is_sorted else 0,
        stack=layout.num_matrices if input.dim() == 3 else 1,
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        constants={
            "TRANSPOSED": transposed,
            "NUM_MATRICES": layout.num_matrices,
            "LANES_S": triton.next_power_of_2(layout.num_matrices + 1),
            "WIDTH_I": width_i,
            "WIDTH_O": width_o,
            "PADDED_I": padded_i,
            "BLOCK_T": sizes.tokens,
            "BLOCK_I": inner,
            "BLOCK_O": block_o,
            "ALIGNED_I": math.gcd(width_i, num_inputs, inner),
            "ALIGNED_W": math.gcd(width_i, inner),
            "MASKED": bool(width_i % inner or num_inputs % width_i),
            "TOGETHER": max(1, _TOKENS_TOGETHER // sizes.tokens),
            "PRECISION": precision,
            "num_warps": sizes.num_warps,
            "num_stages": sizes.num_stages,
        },
    )

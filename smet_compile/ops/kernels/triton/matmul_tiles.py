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
from smet_compile.ops.kernels.triton.operands import copy_to_blocks, is_far, needs_copy, whole_columns
from smet_compile.ops.torch_insides import fp32_precision

_INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
_HALF = (torch.bfloat16, torch.float16)
_TOKENS_TOGETHER = 2048
"""Tokens of a group: with 4096 inputs in bf16 they are 16 MB, of the 50 MB (Ampere: 40) of the L2 cache."""
_MOST_LAUNCHES = 1024
"""How many launches are remembered, of a model whose numbers of tokens change all the time."""


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
def one_block(places, by_column, first_block, num_blocks, number, first_place):
    """Returns the row of ``values`` of block ``number`` of a line, and its place along the line."""
    exists = number < num_blocks
    block = first_block + tl.where(exists, number, 0)
    place = tl.load(places + block, mask=exists, other=0) - first_place
    if by_column is not None:
        block = tl.load(by_column + block, mask=exists, other=0)
    return block, place


@triton.jit
def _blocks_of_step(
    places,
    by_column,
    first_block,
    num_blocks,
    start,
    first_place,
    PADDED_I: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Returns ``one_block`` for a step: scalars where it takes a part of one, else (BLOCK_I,)."""
    number = start // PADDED_I
    block, place = one_block(places, by_column, first_block, num_blocks, number, first_place)
    if PADDED_I < BLOCK_I:
        number_k = tl.arange(0, BLOCK_I) // PADDED_I
        for after in tl.static_range(1, BLOCK_I // PADDED_I):
            other, other_place = one_block(places, by_column, first_block, num_blocks, number + after, first_place)
            block = tl.where(number_k >= after, other, block)
            place = tl.where(number_k >= after, other_place, place)
    return block, place


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
    places,
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
    IS_FAR: tl.constexpr,
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
    # Positions of a block row are consecutive numbers; those along a block column are listed as block rows.
    first_place = tl.zeros((), places.dtype.element_ty)
    if TRANSPOSED:
        first_place += (matrix * block_rows + line).to(places.dtype.element_ty) * block_cols
    # The index passes through a variable of the loop. Read in the step that uses it, it would take stages of the
    # pipeline for itself; so the copies of a later step wait for it alone, while products of this one run.
    block, place = _blocks_of_step(places, by_column, first_block, num_blocks, 0, first_place, PADDED_I, BLOCK_I)
    for start in range(0, length, BLOCK_I):
        next_block, next_place = _blocks_of_step(
            places, by_column, first_block, num_blocks, start + BLOCK_I, first_place, PADDED_I, BLOCK_I
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
        input_k = (place * WIDTH_I).to(tl.int32) + in_block_k
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
        block, place = next_block, next_place

    output_O = line * WIDTH_O + offset_O
    inside_O = in_block_O & (output_O < num_outputs)
    if bias is not None:
        sum_TO += tl.load(bias + output_O, mask=inside_O, other=0.0).to(tl.float32)[None, :]
    out_s += first.to(tl.int64) * num_outputs
    row_T = tl.arange(0, BLOCK_T)
    if IS_FAR:
        row_T = row_T.to(tl.int64)
    to_TO = row_T[:, None] * num_outputs + output_O[None, :]
    tl.store(out_s + to_TO, sum_TO.to(out.dtype.element_ty), mask=inside_T[:, None] & inside_O[None, :])


class _Launch(NamedTuple):
    """Holds the arguments that all launches with one topology and as many tokens share.

    Args:
        lists: places of the blocks, order by column, starts of the lines. sizes: the kernel's arguments from
            ``num_tokens`` to the strides. num_outputs: size of the product.
    """

    kernel: Any
    grid: tuple[int, int]
    lists: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    num_outputs: int
    constants: dict[str, Any]


class _Variant(NamedTuple):
    """Says which product of a topology it is. is_whole: rows of the input end with a block, not with the matrix."""

    transposed: bool
    dtype: torch.dtype
    precision: str
    tokens: tuple[int, ...]
    is_sorted: bool
    is_whole: bool


def masked_matmul(
    input: Tensor,
    values: Tensor,
    topology: Topology,
    transposed: bool,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Computes input W or input Wᵀ for tiles, plus bias, as ``ops.plain.masked_matmul`` defines it."""
    *tokens, num_inputs = input.shape
    width = topology.layout.block_shape[1 if transposed else 0]
    if math.prod(tokens) and (needs_copy(input, width) or is_far(input)):
        input = copy_to_blocks(input, width)
    is_whole = input.shape[-1] != num_inputs
    variant = _Variant(
        transposed, input.dtype, dot_precision(input.dtype), tuple(tokens), offsets is not None, is_whole
    )
    launches: dict[_Variant, _Launch] = topology.constant("masked_tiles", dict)
    launch = launches.get(variant)
    if launch is None:
        if len(launches) >= _MOST_LAUNCHES:
            launches.clear()
        launch = launches[variant] = _prepare(topology, input.device, variant)
    out = input.new_empty(*tokens, launch.num_outputs)
    if out.numel() == 0:
        return out
    strides = input.stride()
    launch.kernel[launch.grid](
        input,
        values.contiguous(),
        bias,
        out,
        *launch.lists,
        offsets,
        *launch.sizes,
        *(strides if len(strides) == 3 else (0, *strides)),
        **launch.constants,
    )
    return out


def _prepare(topology: Topology, device: torch.device, variant: _Variant) -> _Launch:
    layout, transposed = topology.layout, variant.transposed
    (num_outputs, num_inputs), (width_o, width_i) = layout.matrix, layout.block_shape
    if not transposed:
        num_outputs, num_inputs, width_o, width_i = num_inputs, num_outputs, width_i, width_o
    if variant.is_whole:
        num_inputs = whole_columns(num_inputs, width_i)
    block_o = supports.lanes(width_o)
    lines, parts = triton.cdiv(num_outputs, width_o), triton.cdiv(width_o, block_o)
    is_stack, num_tokens = len(variant.tokens) == 2, variant.tokens[-1]
    work = supports.MaskedWork(
        tokens=math.prod(variant.tokens),
        groups=layout.num_matrices,
        lines=lines * parts,
        width=width_o,
        length=topology.num_active / (layout.num_matrices * lines) * width_i,
    )
    sizes = supports.masked_sizes(device, variant.dtype, variant.precision, work)
    inner, padded_i = supports.inner_step(width_i, sizes.inner)
    token_blocks = triton.cdiv(num_tokens, sizes.tokens) + (layout.num_matrices if variant.is_sorted else 0)
    return _Launch(
        kernel=supports.on_device(_masked_tiles, device),
        grid=(token_blocks * lines * parts, layout.num_matrices if is_stack else 1),
        lists=lists_of(topology, transposed),
        sizes=(num_tokens, num_inputs, num_outputs, layout.block_rows, layout.block_cols),
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
            "IS_FAR": num_outputs * sizes.tokens >= 2**31,
            "TOGETHER": max(1, _TOKENS_TOGETHER // sizes.tokens),
            "PRECISION": variant.precision,
            "num_warps": sizes.num_warps,
            "num_stages": sizes.num_stages,
        },
    )


def lists_of(topology: Topology, transposed: bool) -> tuple[Tensor | None, ...]:
    """Returns the places of the blocks along their lines, their order in ``values`` and the starts of the lines."""
    if transposed:
        return topology.positions, None, topology.row_starts
    return topology.rows_by_column, topology.by_column, topology.column_starts

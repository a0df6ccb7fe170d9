"""Computes masked_matmul for tiles with copies by the tensor memory accelerator of Hopper cards (TMA).

It differs from ``matmul_tiles`` in how data comes and goes, not in what is summed in which order. One thread asks for
a whole tile of inputs or weights by its coordinates, and the accelerator writes zeros for what lies outside; other
threads compute no address. Programs stay: as many as fit on the card take lines in turn, the longest first, so that
those that end last are short. It is chosen by name alone until a card has shown where it is faster.

Shape suffixes: T tokens, I and O inputs and outputs of the product, k those of them that one step sums over.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from smet_compile.format import Topology
from smet_compile.ops.kernels.triton import supports
from smet_compile.ops.kernels.triton.matmul_tiles import dot_precision, lists_of, multiply_add, one_block
from smet_compile.ops.kernels.triton.operands import copy_to_blocks, needs_copy

_TOKENS_TOGETHER = 2048
_MOST_LAUNCHES = 1024
_NARROWEST_PART = 32


@triton.jit
def store_sums(out, row, column, sums, PARTS: tl.constexpr):
    """Stores the sums, in two halves where ``PARTS`` is 2: each takes half of the shared memory."""
    if PARTS == 1:
        out.store([row, column], sums.to(out.dtype))
    else:
        HALF: tl.constexpr = sums.shape[1] // 2
        halves = tl.permute(tl.reshape(sums, (sums.shape[0], 2, HALF)), (0, 2, 1))
        first, second = tl.split(halves)
        out.store([row, column], first.to(out.dtype))
        out.store([row, column + HALF], second.to(out.dtype))


@triton.jit
def _masked_by_tma(
    input,
    values,
    out,
    out_pointer,
    bias,
    places,
    by_column,
    line_starts,
    line_order,
    num_tokens,
    num_outputs,
    num_lines,
    block_cols,
    TRANSPOSED: tl.constexpr,
    WIDTH_I: tl.constexpr,
    WIDTH_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PARTS: tl.constexpr,
    TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiplies tokens and lines in turn, in order of (group of tokens, line by length, tokens in the group).

    Args:
        input, values, out: descriptors of matrices, those of ``values`` one below another. ``out`` is None where its
            rows are not aligned; then ``out_pointer`` is stored to.
    """
    STEPS: tl.constexpr = WIDTH_I // BLOCK_I
    token_blocks = tl.cdiv(num_tokens, BLOCK_T)
    for item in tl.range(tl.program_id(0), token_blocks * num_lines, tl.num_programs(0)):
        first_of_group = item // (TOGETHER * num_lines) * TOGETHER
        together = tl.minimum(TOGETHER, token_blocks - first_of_group)
        in_group = item % (TOGETHER * num_lines)
        token = (first_of_group + in_group % together) * BLOCK_T
        line = tl.load(line_order + in_group // together)
        first_block = tl.load(line_starts + line)
        num_blocks = tl.load(line_starts + line + 1) - first_block
        first_place = 0
        if TRANSPOSED:
            first_place = line * block_cols
        sum_TO = tl.zeros((BLOCK_T, WIDTH_O), tl.float32)
        # The index passes through a variable of the loop, as in ``matmul_tiles``.
        block, place = one_block(places, by_column, first_block, num_blocks, 0, first_place)
        for step in range(num_blocks * STEPS):
            number = (step + 1) // STEPS
            next_block, next_place = one_block(places, by_column, first_block, num_blocks, number, first_place)
            within = step % STEPS * BLOCK_I
            a_Tk = input.load([token, place * WIDTH_I + within])
            if TRANSPOSED:
                b_kO = values.load([block * WIDTH_O, within]).T
            else:
                b_kO = values.load([block * WIDTH_I + within, 0])
            sum_TO = multiply_add(a_Tk, b_kO, sum_TO, PRECISION)
            block, place = next_block, next_place
        output_O = line * WIDTH_O + tl.arange(0, WIDTH_O)
        inside_O = output_O < num_outputs
        if bias is not None:
            sum_TO += tl.load(bias + output_O, mask=inside_O, other=0.0).to(tl.float32)[None, :]
        if out is not None:
            store_sums(out, token, line * WIDTH_O, sum_TO, PARTS)
        else:
            row_T = tl.arange(0, BLOCK_T)
            to_TO = out_pointer + token.to(tl.int64) * num_outputs + (row_T[:, None] * num_outputs + output_O[None, :])
            inside_TO = (token + row_T < num_tokens)[:, None] & inside_O[None, :]
            tl.store(to_TO, sum_TO.to(out_pointer.dtype.element_ty), mask=inside_TO)


class _Launch(NamedTuple):
    """Holds what all launches with one topology and as many tokens share.

    Args:
        lists: places of the blocks, order by column, starts of the lines, lines by length. sizes: the kernel's
            arguments after them. blocks: shapes of a copied tile of input, values and output.
    """

    kernel: Any
    grid: tuple[int]
    lists: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    blocks: tuple[list[int], list[int], list[int]]
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
    """Computes input W or input Wᵀ for tiles of one matrix, plus bias, as ``ops.plain.masked_matmul`` defines it."""
    assert offsets is None, "the kernel's refusal says so"
    if input.dim() == 3:
        return masked_matmul(input.squeeze(0), values, topology, transposed, bias).unsqueeze(0)
    input = described_rows(input, topology.layout.block_shape[1 if transposed else 0])
    launches: dict[Any, _Launch] = topology.constant("masked_by_tma", dict)
    key = transposed, input.dtype, len(input)
    launch = launches.get(key)
    if launch is None:
        if len(launches) >= _MOST_LAUNCHES:
            launches.clear()
        launch = launches[key] = _prepare(topology, input, transposed)
    out = input.new_empty(len(input), launch.num_outputs)
    if out.numel() == 0:
        return out
    if topology.num_active == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    is_aligned = launch.num_outputs * out.element_size() % 16 == 0
    of_input, of_values, of_out = launch.blocks
    launch.kernel[launch.grid](
        TensorDescriptor.from_tensor(input, of_input),
        TensorDescriptor.from_tensor(described_rows(values.flatten(0, 1), values.shape[-1]), of_values),
        TensorDescriptor.from_tensor(out, of_out) if is_aligned else None,
        None if is_aligned else out,
        bias,
        *launch.lists,
        *launch.sizes,
        **launch.constants,
    )
    return out


def described_rows(operand: Tensor, width: int) -> Tensor:
    """Returns a matrix that a descriptor can describe: of aligned rows, none of which overlap."""
    if needs_copy(operand, width) or operand.stride(0) < operand.shape[1]:
        return copy_to_blocks(operand, width)
    return operand


def _prepare(topology: Topology, input: Tensor, transposed: bool) -> _Launch:
    layout, num_tokens = topology.layout, len(input)
    (num_outputs, _), (width_o, width_i) = layout.matrix, layout.block_shape
    if not transposed:
        num_outputs, width_o, width_i = layout.cols, width_i, width_o
    lines = triton.cdiv(num_outputs, width_o)
    work = supports.MaskedWork(num_tokens, 1, lines, width_o, topology.num_active / lines * width_i)
    sms = supports.num_sms(input.device)
    sizes = supports.tma_sizes(work, sms, input.dtype.itemsize, input.device)
    inner, parts = min(width_i, sizes.inner), 2 if width_o > _NARROWEST_PART else 1
    programs = sms * (1 if sizes.num_warps > supports.WARPS_OF_TWO else 2)
    places, by_column, starts = lists_of(topology, transposed)
    assert starts is not None, "tiles have lines"
    order = starts.diff().argsort(descending=True, stable=True).to(starts.dtype)
    return _Launch(
        kernel=supports.on_device(_masked_by_tma, input.device),
        grid=(min(programs, lines * triton.cdiv(num_tokens, sizes.tokens)),),
        lists=(places, by_column, starts, order),
        sizes=(num_tokens, num_outputs, lines, layout.block_cols),
        blocks=(
            [sizes.tokens, inner],
            [width_o, inner] if transposed else [inner, width_o],
            [sizes.tokens, width_o // parts],
        ),
        num_outputs=num_outputs,
        constants={
            "TRANSPOSED": transposed,
            "WIDTH_I": width_i,
            "WIDTH_O": width_o,
            "BLOCK_T": sizes.tokens,
            "BLOCK_I": inner,
            "PARTS": parts,
            "TOGETHER": max(1, _TOKENS_TOGETHER // sizes.tokens),
            "PRECISION": dot_precision(input.dtype),
            "num_warps": sizes.num_warps,
            "num_stages": sizes.num_stages,
        },
    )

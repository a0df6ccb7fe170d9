"""Computes sampled_matmul for tiles with copies by the tensor memory accelerator of Hopper cards (TMA).

A program makes two consecutive active blocks of a block row, side by side: 128 rows by 256 columns of tiles of 128, so
that a step reads 85 FLOP a byte where one tile alone reads 64. The rows of the left factor are copied once for both.
Where there are too few programs the tokens are split, as in ``sampled_tiles``, and the parts are added in order.

Shape suffixes: T tokens, m and n rows and columns of a tile, P pieces: active blocks of one program.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from smet_compile.format import Topology
from smet_compile.ops.kernels.triton import supports
from smet_compile.ops.kernels.triton.matmul_tiles import dot_precision, multiply_add
from smet_compile.ops.kernels.triton.matmul_tma import described_rows, store_sums
from smet_compile.ops.kernels.triton.sampled_tiles import LINES_TOGETHER, add_splits, num_splits

_TOKENS_OF_A_STEP = 64
_BLOCKS_TOGETHER, _STAGES = 2, 4
_MOST_SPLITS_KEPT = 1024


@triton.jit
def _store_block(out, block, exists, line, place, sum_mn, num_rows, num_cols, HANGS_OVER: tl.constexpr):
    """Stores a block, zero beyond the edge of the matrix: there a factor is 0, but the other one may be NaN."""
    HEIGHT: tl.constexpr = sum_mn.shape[0]
    WIDTH: tl.constexpr = sum_mn.shape[1]
    if HANGS_OVER:
        row_m = line * HEIGHT + tl.arange(0, HEIGHT)
        col_n = place * WIDTH + tl.arange(0, WIDTH)
        sum_mn = tl.where((row_m < num_rows)[:, None] & (col_n < num_cols)[None, :], sum_mn, 0.0)
    if exists:
        store_sums(out, block * HEIGHT, 0, sum_mn, 2)


@triton.jit
def _sampled_by_tma(
    left,
    right,
    out,
    positions,
    row_starts,
    first_blocks,
    lines,
    num_pieces,
    num_tokens,
    num_splits,
    num_active,
    block_cols,
    num_rows,
    num_cols,
    WIDTH_M: tl.constexpr,
    WIDTH_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HANGS_OVER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Makes pieces of two blocks, each over all tokens or over a split of them.

    Args:
        left, right, out: descriptors of matrices: of one block row or column by ``BLOCK_T`` tokens; of a block.
        first_blocks, lines: (P,) the first block and the block row of each piece.
    """
    share = tl.cdiv(tl.cdiv(num_tokens, num_splits), BLOCK_T) * BLOCK_T
    for item in tl.range(tl.program_id(0), num_pieces * num_splits, tl.num_programs(0)):
        piece, split = item % num_pieces, item // num_pieces
        line, block = tl.load(lines + piece), tl.load(first_blocks + piece)
        has_two = block + 1 < tl.load(row_starts + line + 1)
        first_place = tl.load(positions + block) - line * block_cols
        second_place = tl.load(positions + block + has_two.to(tl.int32)) - line * block_cols
        first_mn = tl.zeros((WIDTH_M, WIDTH_N), tl.float32)
        second_mn = tl.zeros((WIDTH_M, WIDTH_N), tl.float32)
        for token in range(split * share, tl.minimum(split * share + share, num_tokens), BLOCK_T):
            a_mT = left.load([token, line * WIDTH_M]).T
            first_mn = multiply_add(a_mT, right.load([token, first_place * WIDTH_N]), first_mn, PRECISION)
            second_mn = multiply_add(a_mT, right.load([token, second_place * WIDTH_N]), second_mn, PRECISION)
        row = split * num_active + block
        _store_block(out, row, True, line, first_place, first_mn, num_rows, num_cols, HANGS_OVER)
        _store_block(out, row + 1, has_two, line, second_place, second_mn, num_rows, num_cols, HANGS_OVER)


class _Launch(NamedTuple):
    """Holds what all launches with one topology share.

    Args:
        at_once: programs that the card runs at a time. splits: number of tokens → number of splits.
    """

    kernel: Any
    lists: tuple[Tensor, ...]
    num_pieces: int
    at_once: int
    splits: dict[int, int]
    constants: dict[str, Any]


def sampled_matmul(left: Tensor, right: Tensor, topology: Topology, offsets: Tensor | None = None) -> Tensor:
    """Computes pack(leftᵀ right) for tiles of one matrix, as ``ops.plain.sampled_matmul`` defines it."""
    assert offsets is None, "the kernel's refusal says so"
    if left.dim() == 3:
        left, right = left.squeeze(0), right.squeeze(0)
    layout, num_tokens = topology.layout, len(left)
    bm, bn = layout.block_shape
    out = left.new_empty(*topology.values_shape)
    if out.numel() == 0:
        return out
    if num_tokens == 0:
        return out.zero_()
    launch: _Launch = topology.constant(("sampled_by_tma", left.dtype), lambda: _prepare(topology, left))
    splits = _num_splits(launch, topology, left)
    parts = out if splits == 1 else left.new_empty(splits, *topology.values_shape, dtype=torch.float32)
    step = launch.constants["BLOCK_T"]
    programs = min(launch.at_once, launch.num_pieces * splits)
    launch.kernel[(programs,)](
        TensorDescriptor.from_tensor(described_rows(left, bm), [step, bm]),
        TensorDescriptor.from_tensor(described_rows(right, bn), [step, bn]),
        TensorDescriptor.from_tensor(parts.view(-1, bn), [bm, bn // 2]),
        *launch.lists,
        launch.num_pieces,
        num_tokens,
        splits,
        topology.num_active,
        layout.block_cols,
        layout.rows,
        layout.cols,
        **launch.constants,
    )
    if splits > 1:
        add_splits(parts, out)
    return out


def _num_splits(launch: _Launch, topology: Topology, left: Tensor) -> int:
    splits = launch.splits.get(len(left))
    if splits is None:
        if len(launch.splits) >= _MOST_SPLITS_KEPT:
            launch.splits.clear()
        layout, step = topology.layout, launch.constants["BLOCK_T"]
        splits = num_splits(launch.at_once, layout, len(left), topology.num_active, _BLOCKS_TOGETHER, step)
        launch.splits[len(left)] = splits
    return splits


def _prepare(topology: Topology, left: Tensor) -> _Launch:
    layout = topology.layout
    bm, bn = layout.block_shape
    positions, row_starts = topology.positions, topology.row_starts
    assert positions is not None and row_starts is not None, "tiles have lists"
    is_interpreted = supports.architecture(left.device) == "interpreter"
    first_blocks, lines = _pieces(row_starts)
    warps = 8 if min(bm, bn) > 64 else 4
    return _Launch(
        kernel=supports.on_device(_sampled_by_tma, left.device),
        lists=(positions, row_starts, first_blocks, lines),
        num_pieces=len(lines),
        at_once=supports.num_sms(left.device) * (1 if warps > supports.WARPS_OF_TWO else 2),
        splits={},
        constants={
            "WIDTH_M": bm,
            "WIDTH_N": bn,
            "BLOCK_T": _TOKENS_OF_A_STEP,
            "HANGS_OVER": bool(layout.rows % bm or layout.cols % bn),
            "PRECISION": dot_precision(left.dtype),
            "num_warps": warps,
            "num_stages": 1 if is_interpreted else _STAGES,
        },
    )


def _pieces(row_starts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first block and the block row of each piece; waits for the device, to count them.

    Pieces are ordered by groups of block rows, and within one by their number in the row: those that run together
    read few rows of the left factor, and columns of the right one that are near each other.
    """
    lengths = row_starts.diff()
    pieces = (lengths + _BLOCKS_TOGETHER - 1) // _BLOCKS_TOGETHER
    line_P = torch.arange(len(lengths), device=row_starts.device).repeat_interleave(pieces)
    number_P = torch.arange(len(line_P), device=row_starts.device) - (pieces.cumsum(0) - pieces)[line_P]
    group_P, most = line_P // LINES_TOGETHER, len(line_P)
    order_P = (group_P * most + number_P).argsort(stable=True)
    first_P = row_starts[line_P] + number_P * _BLOCKS_TOGETHER
    return first_P[order_P].to(row_starts.dtype), line_P[order_P].to(row_starts.dtype)

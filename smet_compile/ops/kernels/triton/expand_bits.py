"""Single weights and runs, expanded and compacted: every dense element is written once, at its place.

A program takes some groups of block positions, expands their bits, and finds by a prefix sum on top of
``group_starts`` which row of ``values`` each active one is. No pass only clears, and only active entries are read.

Shape suffixes: B block positions of a program, Y their bytes of bits, b bits of a byte, E entries of a block.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from smet_compile.format import Layout, blocks_per_group

_ENTRIES = 4096
"""Dense entries that a program takes, about: enough to hide that its bits come before all else."""


@triton.jit
def ranks(topology, num_bytes, BYTES: tl.constexpr):
    """Of the 8 ``BYTES`` block positions from the start of a byte: are they active, and how many of them
    before each are.

    Args:
        topology: pointer to their first byte. num_bytes: how many bytes there are; the others are 0.

    Returns: (8 BYTES,) bool, and int32.
    """
    byte_Y = tl.arange(0, BYTES)
    bits_Y = tl.load(topology + byte_Y, mask=byte_Y < num_bytes, other=0).to(tl.int32)
    below_Yb = bits_Y[:, None] & ((1 << tl.arange(0, 8)) - 1)[None, :]
    active_Yb = (bits_Y[:, None] >> tl.arange(0, 8)[None, :]) & 1
    in_byte_Y = count_ones(bits_Y)
    before_Y = tl.cumsum(in_byte_Y, 0) - in_byte_Y
    rank_Yb = before_Y[:, None] + count_ones(below_Yb)
    return tl.reshape(active_Yb != 0, (8 * BYTES,)), tl.reshape(rank_Yb, (8 * BYTES,))


@triton.jit
def count_ones(byte):
    """Bits that are set, of numbers below 256."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


@triton.jit
def _expand_bits(
    values,
    dense,
    topology,
    group_starts,
    first_position,
    end_position,
    first_program,
    num_bytes,
    block_rows,
    block_cols,
    num_rows,
    num_cols,
    stride_s,
    stride_r,
    stride_c,
    WIDTH_M: tl.constexpr,
    WIDTH_N: tl.constexpr,
    GROUP: tl.constexpr,
    USED: tl.constexpr,
    BYTES: tl.constexpr,
    ENTRIES: tl.constexpr,
    FLAT: tl.constexpr,
    PACKS: tl.constexpr,
):
    """Values → dense, or back where ``PACKS``, for the blocks at ``first_position`` ≤ p < ``end_position``.

    Of single weights and runs, whose blocks have one side of length one. A program takes ``USED`` bytes of bits, a
    whole number of groups of ``GROUP`` positions, in ``BYTES`` lanes. ``dense`` begins with ``first_position``, the
    first of a block row. ``FLAT``: it is contiguous, and no block hangs over.
    """
    LENGTH: tl.constexpr = WIDTH_M * WIDTH_N
    program = first_program + tl.program_id(0)
    byte = program.to(tl.int64) * USED
    starts = tl.load(group_starts + program.to(tl.int64) * (8 * USED // GROUP))
    here = tl.minimum(USED, num_bytes - byte)
    active_B, rank_B = ranks(topology + byte, here, BYTES)
    lane_B = tl.arange(0, 8 * BYTES)
    first_lane = first_position - byte * 8  # below 0 unless this is the first program
    taken_B = (lane_B < 8 * USED) & (lane_B >= first_lane) & (lane_B < end_position - byte * 8)
    active_B = active_B & taken_B
    values += starts.to(tl.int64) * LENGTH
    if not FLAT:
        position_B = byte * 8 + lane_B
        block_row_B = position_B // block_cols
        matrix_B = block_row_B // block_rows
        top_B = block_row_B % block_rows * WIDTH_M
        left_B = position_B % block_cols * WIDTH_N
        first_matrix = first_position // block_cols // block_rows
        first_row = first_position // block_cols % block_rows * WIDTH_M
        corner_B = (matrix_B - first_matrix) * stride_s + (top_B - first_row) * stride_r + left_B * stride_c
    for start in tl.static_range(0, LENGTH, ENTRIES):
        entry_E = start + tl.arange(0, ENTRIES)
        taken_BE = taken_B[:, None] & (entry_E < LENGTH)[None, :]
        active_BE = active_B[:, None] & (entry_E < LENGTH)[None, :]
        if FLAT:
            dense_BE = dense - first_lane * LENGTH + (lane_B[:, None] * LENGTH + entry_E[None, :])
            inside_BE = taken_BE
        elif WIDTH_M == 1:
            dense_BE = dense + corner_B[:, None] + entry_E.to(tl.int64)[None, :] * stride_c
            inside_BE = taken_BE & (left_B[:, None] + entry_E[None, :] < num_cols)
        else:
            dense_BE = dense + corner_B[:, None] + entry_E.to(tl.int64)[None, :] * stride_r
            inside_BE = taken_BE & (top_B[:, None] + entry_E[None, :] < num_rows)
        values_BE = values + rank_B[:, None] * LENGTH + entry_E[None, :]
        if PACKS:
            entries_BE = tl.load(dense_BE, mask=active_BE & inside_BE, other=0.0)
            tl.store(values_BE, entries_BE, mask=active_BE)
        else:
            entries_BE = tl.load(values_BE, mask=active_BE & inside_BE, other=0.0)
            tl.store(dense_BE, entries_BE, mask=inside_BE)


class Span(NamedTuple):
    """Block positions from the first of one block row up to the first of another."""

    first: int
    end: int


def expand_bits(
    values: Tensor, dense_SRC: Tensor, topology: Tensor, group_starts: Tensor, layout: Layout, span: Span, packs: bool
) -> None:
    """Writes ``dense_SRC``, which begins with the first block of ``span``, from ``values``; ``packs``: the reverse."""
    bm, bn = layout.block_shape
    length = bm * bn
    group = blocks_per_group(layout)
    unit = math.lcm(group, 8)
    positions = unit * max(1, _ENTRIES // (unit * length))
    num_bytes = triton.next_power_of_2(positions // 8)
    first_program = span.first // positions
    _expand_bits[(triton.cdiv(span.end, positions) - first_program,)](
        values,
        dense_SRC,
        topology,
        group_starts,
        span.first,
        span.end,
        first_program,
        topology.numel(),
        layout.block_rows,
        layout.block_cols,
        layout.rows,
        layout.cols,
        *dense_SRC.stride(),
        WIDTH_M=bm,
        WIDTH_N=bn,
        GROUP=group,
        USED=positions // 8,
        BYTES=num_bytes,
        ENTRIES=min(triton.next_power_of_2(length), max(1, _ENTRIES // (8 * num_bytes))),
        FLAT=bm == 1 and layout.cols % bn == 0 and dense_SRC.is_contiguous(),
        PACKS=packs,
        num_warps=8,
    )

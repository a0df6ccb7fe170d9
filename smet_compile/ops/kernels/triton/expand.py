"""Computes unpack and pack for every kind of block: blocks are expanded into a dense weight, or compacted from it.

Tiles: a program writes one block, of the dense weight or of ``values``.

Single weights and runs: a program takes some groups of block positions, expands their bits, and finds by a prefix sum
on top of ``group_starts`` which row of ``values`` each active one has. Every dense element is written once, so nothing
is cleared before, and only active entries are read.

Shape suffixes: S stacked matrices, R rows, C cols, B block positions of a program, Y their bytes of bits, b bits of a
byte, E entries of a block, m and n rows and columns of a block, K block columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from smet_compile.format import Topology
from smet_compile.ops.kernels.triton import supports

_ENTRIES = 4096
"""Approximate number of dense entries of a program: enough to hide the time in which it waits for its bits."""
_LANES_K = 256


class Span(NamedTuple):
    """Holds the block positions from the first of one block row up to the first of another."""

    first: int
    end: int


class Move(NamedTuple):
    """Holds the arguments that all launches for some blocks of one topology share.

    Args:
        shape: shape of the result. lists: bits and lists. sizes: the kernel's arguments after them.
        strides: strides of a contiguous dense side. is_matrix: whether the dense side has two dimensions.
    """

    kernel: Any
    grid: tuple[int]
    shape: tuple[int, ...]
    lists: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    is_matrix: bool
    constants: dict[str, Any]

    def launch(self, values: Tensor, dense: Tensor, strides: tuple[int, ...]) -> None:
        """Moves the blocks; ``strides`` (S, R, C) are those of ``dense``."""
        self.kernel[self.grid](values, dense, *self.lists, *self.sizes, *strides, **self.constants)


def unpack(values: Tensor, topology: Topology) -> Tensor:
    """Returns the dense weight of ``values``, as ``format.unpack`` defines it. Values may be of any strides."""
    move = topology.constant("unpack", lambda: _prepare_all(topology, packs=False, is_flat=True))
    dense = values.new_empty(*move.shape)
    move.launch(values.contiguous(), dense, move.strides)
    return dense


def pack(dense: Tensor, topology: Topology) -> Tensor:
    """Returns the active blocks of ``dense``, as ``format.pack`` defines it. A transposed matrix is read as it lies."""
    if dense.is_contiguous():
        move = topology.constant("pack flat", lambda: _prepare_all(topology, packs=True, is_flat=True))
        strides = move.strides
    else:
        move = topology.constant("pack", lambda: _prepare_all(topology, packs=True, is_flat=False))
        strides = dense.stride()
        if move.is_matrix:
            strides = topology.layout.rows * strides[0], *strides
        else:
            dense = dense.reshape(-1, *topology.layout.matrix)
            strides = dense.stride()
    values = dense.new_empty(*move.shape)
    move.launch(values, dense, strides)
    return values


def _prepare_all(topology: Topology, packs: bool, is_flat: bool) -> Move:
    return prepare_move(topology, Span(0, topology.layout.num_blocks), packs, is_flat)


def prepare_move(topology: Topology, span: Span, packs: bool, is_flat: bool) -> Move:
    """Prepares launches that move the blocks of ``span``, with which the dense side begins.

    Args:
        packs: from dense to values; else the reverse. is_flat: the dense side is contiguous.
    """
    layout = topology.layout
    bm, bn = layout.block_shape
    sides = layout.block_rows, layout.block_cols, layout.rows, layout.cols
    shape = layout.values_shape(topology.num_active) if packs else layout.shape
    strides = layout.rows * layout.cols, layout.cols, 1
    device, is_matrix = topology.bits.device, layout.shape == layout.matrix
    constants: dict[str, Any] = {"WIDTH_M": bm, "WIDTH_N": bn, "PACKS": packs}
    lists: tuple[Tensor | None, ...]
    if layout.tiles:
        block_n = min(128, triton.next_power_of_2(bn))
        constants |= {
            "BLOCK_M": min(_ENTRIES // block_n, triton.next_power_of_2(bm)),
            "BLOCK_N": block_n,
            "LANES_K": _LANES_K,
            "num_warps": 4,
        }
        lists = topology.bits, topology.positions, topology.row_starts
        grid = (topology.num_active if packs else span.end - span.first,)
        kernel = supports.on_device(_expand_tiles, device)
        return Move(kernel, grid, shape, lists, (*span, *sides), strides, is_matrix, constants)
    group = layout.blocks_per_group
    unit = math.lcm(group, 8)
    positions = unit * max(1, _ENTRIES // (unit * bm * bn))
    num_bytes = triton.next_power_of_2(positions // 8)
    first_program = span.first // positions
    constants |= {
        "GROUP": group,
        "USED": positions // 8,
        "BYTES": num_bytes,
        "ENTRIES": min(triton.next_power_of_2(bm * bn), max(1, _ENTRIES // (8 * num_bytes))),
        "FLAT": bm == 1 and layout.cols % bn == 0 and is_flat,
        "num_warps": 8,
    }
    grid = (triton.cdiv(span.end, positions) - first_program,)
    lists = topology.bits, topology.group_starts
    sizes = *span, first_program, topology.bits.numel(), *sides
    kernel = supports.on_device(_expand_bits, device)
    return Move(kernel, grid, shape, lists, sizes, strides, is_matrix, constants)


@triton.jit
def _count_active_before(topology, line, across, block_cols, LANES_K: tl.constexpr):
    """Counts the active blocks of block row ``line`` before block column ``across``."""
    first = line.to(tl.int64) * block_cols
    lane_K = tl.arange(0, LANES_K)
    counted_K = tl.zeros((LANES_K,), tl.int32)
    for start in range(0, across, LANES_K):
        position_K = first + start + lane_K
        byte_K = tl.load(topology + position_K // 8, mask=start + lane_K < across, other=0).to(tl.int32)
        counted_K += (byte_K >> (position_K % 8).to(tl.int32)) & 1
    return tl.sum(counted_K)


@triton.jit
def _expand_tiles(
    values,
    dense,
    topology,
    positions,
    row_starts,
    first_position,
    end_position,
    block_rows,
    block_cols,
    num_rows,
    num_cols,
    stride_s,
    stride_r,
    stride_c,
    WIDTH_M: tl.constexpr,
    WIDTH_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES_K: tl.constexpr,
    PACKS: tl.constexpr,
):
    """Moves values to dense, a program for each position; or back where ``PACKS``, one for each active block.

    It moves the blocks at ``first_position`` ≤ p < ``end_position``; ``dense`` begins with the first, a block row's
    first.
    """
    if PACKS:
        block = tl.program_id(0)
        position = tl.load(positions + block)
        if (position < first_position) | (position >= end_position):
            return
        active = True
    else:
        position = first_position + tl.program_id(0)
        active = ((tl.load(topology + position // 8).to(tl.int32) >> (position % 8)) & 1) != 0
    line, across = position // block_cols, position % block_cols
    if not PACKS:
        block = tl.load(row_starts + line)
        if active:
            block += _count_active_before(topology, line, across, block_cols, LANES_K)
    first_line = first_position // block_cols
    top, left = line % block_rows * WIDTH_M, across * WIDTH_N
    dense += (line // block_rows - first_line // block_rows).to(tl.int64) * stride_s
    dense += (top - first_line % block_rows * WIDTH_M).to(tl.int64) * stride_r + left.to(tl.int64) * stride_c
    values += block.to(tl.int64) * (WIDTH_M * WIDTH_N)
    for first_m in range(0, WIDTH_M, BLOCK_M):
        for first_n in range(0, WIDTH_N, BLOCK_N):
            m = first_m + tl.arange(0, BLOCK_M)
            n = first_n + tl.arange(0, BLOCK_N)
            within_mn = (m < WIDTH_M)[:, None] & (n < WIDTH_N)[None, :]
            inside_mn = within_mn & (top + m < num_rows)[:, None] & (left + n < num_cols)[None, :]
            dense_mn = dense + m.to(tl.int64)[:, None] * stride_r + n.to(tl.int64)[None, :] * stride_c
            values_mn = values + m[:, None] * WIDTH_N + n[None, :]
            if PACKS:
                tl.store(values_mn, tl.load(dense_mn, mask=inside_mn, other=0.0), mask=within_mn)
            else:
                tl.store(dense_mn, tl.load(values_mn, mask=inside_mn & active, other=0.0), mask=inside_mn)


@triton.jit
def _ranks(topology, num_bytes, BYTES: tl.constexpr):
    """Finds the active ones of 8 ``BYTES`` block positions from the start of a byte.

    Args:
        topology: pointer to their first byte. num_bytes: how many bytes there are; the others are 0.

    Returns: (8 BYTES,) bool: are they active; and int32: how many of them before each are.
    """
    byte_Y = tl.arange(0, BYTES)
    bits_Y = tl.load(topology + byte_Y, mask=byte_Y < num_bytes, other=0).to(tl.int32)
    below_Yb = bits_Y[:, None] & ((1 << tl.arange(0, 8)) - 1)[None, :]
    active_Yb = (bits_Y[:, None] >> tl.arange(0, 8)[None, :]) & 1
    in_byte_Y = _count_ones(bits_Y)
    before_Y = tl.cumsum(in_byte_Y, 0) - in_byte_Y
    rank_Yb = before_Y[:, None] + _count_ones(below_Yb)
    return tl.reshape(active_Yb != 0, (8 * BYTES,)), tl.reshape(rank_Yb, (8 * BYTES,))


@triton.jit
def _count_ones(byte):
    """Counts the bits that are set in numbers below 256."""
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
    """Moves values to dense, or back where ``PACKS``, for the blocks at ``first_position`` ≤ p < ``end_position``.

    Blocks are single weights or runs, with one side of length one. A program takes ``USED`` bytes of bits, a whole
    number of groups of ``GROUP`` positions, in ``BYTES`` lanes. ``dense`` begins with ``first_position``, the first of
    a block row. ``FLAT``: it is contiguous, and no block hangs over.
    """
    LENGTH: tl.constexpr = WIDTH_M * WIDTH_N
    program = first_program + tl.program_id(0)
    byte = program.to(tl.int64) * USED
    starts = tl.load(group_starts + program.to(tl.int64) * (8 * USED // GROUP))
    here = tl.minimum(USED, num_bytes - byte)
    active_B, rank_B = _ranks(topology + byte, here, BYTES)
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

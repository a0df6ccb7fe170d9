"""Implements the kernel named "torch", which computes every op on any device and is the fallback of all others.

It differs from the reference in ``ops.law`` by the memory it takes. Tiles are multiplied line by line (block rows, or
block columns), one GEMM each, so that no dense weight is made and each sum is rounded once. Single weights and runs are
expanded into one dense scratch. An update takes a few rows at a time, so that its temporary tensors are small.

Shape suffixes: S stacked matrices, T tokens, R rows, C cols, N active blocks, n of them in one line, I and O the
inputs and outputs of a product (C and R, or R and C), B blocks across a line, b their width.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smet_compile.format import WEIGHTS_OF_A_GROUP, Topology, blocks, positions_of, unpack_bits
from smet_compile.ops import captures
from smet_compile.ops.law_of_updates import Begun, Location, move_nothing
from smet_compile.ops.updates import Update


def unpack(values: Tensor, topology: Topology) -> Tensor:
    """Returns the dense weight of ``values``: zero where no block is active."""
    return blocks.unpack(values, topology.active_blocks(), topology.layout)


def pack(dense: Tensor, topology: Topology) -> Tensor:
    """Returns the active blocks of ``dense``, in row-major order of position."""
    active = topology.active_blocks()
    if active.dtype == torch.bool:
        active = positions_of(active, topology.num_active)
    return blocks.pack(dense, active, topology.layout)


def masked_matmul(
    input: Tensor,
    values: Tensor,
    topology: Topology,
    transposed: bool,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Returns input W, or input Wᵀ where ``transposed``, W being the unpacked weight.

    Args:
        input: (T, I); (S, T, I) for a stack; with ``offsets`` (T, I) of tokens sorted by matrix.
        values: (N,) or (N, bm, bn), in the dtype of ``input``.
        bias: (O,), in the dtype of ``input``; added to every row.
        offsets: (S,) int32: the tokens of matrix s end before row ``offsets[s]``. The output of rows past the last
            offset is the bias, or zero.

    Returns:
        (T, O) or (S, T, O), new and contiguous.
    """
    ends = _ends(offsets)
    if topology.layout.tiles:
        return _masked_by_tiles(input, values, topology, transposed, bias, ends)
    dense_SRC = unpack(values, topology).view(-1, *topology.layout.matrix)
    return multiply_stack(input, dense_SRC.mT if transposed else dense_SRC, bias, ends)


def sampled_matmul(left: Tensor, right: Tensor, topology: Topology, offsets: Tensor | None = None) -> Tensor:
    """Returns pack(leftᵀ right), the active blocks of the product.

    Args:
        left, right: (T, R) and (T, C); (S, T, R) and (S, T, C) for a stack; with ``offsets`` 2-D, sorted by matrix
            as the input of ``masked_matmul``. Rows past the last offset are ignored.

    Returns:
        (N,) or (N, bm, bn), in the dtype of ``left``; entries that hang over an edge are zero.
    """
    layout = topology.layout
    ends = _ends(offsets)
    if layout.tiles:
        return _sampled_by_tiles(left, right, topology, ends)
    if ends is None:
        dense = left.mT @ right
    else:
        pairs = zip(by_matrix(left, ends), by_matrix(right, ends), strict=True)
        dense = left.new_empty(layout.num_matrices, *layout.matrix)
        for product_RC, (left_TR, right_TC) in zip(dense, pairs, strict=True):
            product_RC.copy_(left_TR.mT @ right_TC)
    return pack(dense.view(layout.shape), topology)


def _ends(offsets: Tensor | None) -> list[int] | None:
    """Copies offsets to the host, which waits for a GPU."""
    if offsets is None:
        return None
    advice = "take tiles, which Triton multiplies on the device, or compile without CUDA graphs"
    captures.refuse_to_wait(offsets.device, "plain torch that multiplies tokens sorted by matrix", advice)
    ends: list[int] = offsets.tolist()
    return ends


def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiplies (T, I) by (I, O), or (S, T, I) by (S, I, O)."""
    if bias is None:
        return input @ weight
    return torch.addmm(bias, input, weight) if input.dim() == 2 else torch.baddbmm(bias, input, weight)


def multiply_stack(input: Tensor, dense_SIO: Tensor, bias: Tensor | None, ends: list[int] | None) -> Tensor:
    """Computes ``masked_matmul`` for a dense weight. ``ends`` are the offsets as a list."""
    if ends is None:
        return _multiply(input, dense_SIO.squeeze(0) if input.dim() == 2 else dense_SIO, bias)
    out = zeros_or_bias(input, dense_SIO.shape[-1], bias)
    for input_TI, weight_IO, out_TO in zip(by_matrix(input, ends), dense_SIO, by_matrix(out, ends), strict=True):
        out_TO.copy_(_multiply(input_TI, weight_IO, bias))
    return out


def zeros_or_bias(input: Tensor, num_outputs: int, bias: Tensor | None) -> Tensor:
    """Returns the product with a weight that has no active block."""
    out = input.new_empty(*input.shape[:-1], num_outputs)
    return out.zero_() if bias is None else out.copy_(bias)


def by_matrix(tokens: Tensor, ends: list[int] | None) -> list[Tensor]:
    """Returns the tokens (T, ...) of each matrix, as views."""
    if ends is not None:
        return [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [tokens] if tokens.dim() == 2 else list(tokens.unbind())


def with_rows_in_order(tokens: Tensor) -> Tensor:
    """Returns the tokens with the numbers of each side by side in memory; a copy where they are not."""
    return tokens if tokens.is_contiguous() or tokens.stride(-1) == 1 else tokens.contiguous()


class _Line(NamedTuple):
    """Holds a block row, or a block column, that has active blocks: the ``number``-th of its matrix."""

    matrix: int
    number: int
    across_n: Tensor
    """Block columns of its blocks; for a block column their block rows."""
    rows_n: Tensor
    """Rows of ``values`` of its blocks."""


def _lines(topology: Topology, by_column: bool) -> Iterator[_Line]:
    """Yields the block rows or block columns that have blocks, matrix by matrix; copies their sizes to the host."""
    advice = "train in a dtype that Triton multiplies (fp32, bf16, fp16), or without CUDA graphs"
    captures.refuse_to_wait(topology.bits.device, "plain torch that multiplies tiles line by line", advice)
    layout, positions_N = topology.layout, topology.active_blocks()
    row, col = positions_N // layout.block_cols, positions_N % layout.block_cols
    line, across, lines_of_matrix = row, col, layout.block_rows
    if by_column:
        line, across = row // layout.block_rows * layout.block_cols + col, row % layout.block_rows
        lines_of_matrix = layout.block_cols
    order = line.argsort(stable=True)
    counts = line.bincount().tolist()
    parts = zip(across[order].split(counts), order.split(counts), strict=True)
    for number, (across_n, rows_n) in enumerate(parts):
        if rows_n.numel():
            yield _Line(*divmod(number, lines_of_matrix), across_n, rows_n)


def _in_blocks(tokens_TI: Tensor, width: int) -> Tensor:
    """Returns (T, B, b), padded with zeros at the edge; a view where nothing hangs over."""
    over = -tokens_TI.shape[1] % width
    return (F.pad(tokens_TI, (0, over)) if over else tokens_TI).unflatten(1, (-1, width))


def _masked_by_tiles(
    input: Tensor,
    values: Tensor,
    topology: Topology,
    transposed: bool,
    bias: Tensor | None,
    ends: list[int] | None,
) -> Tensor:
    """Multiplies line by line: gathers the inputs that a line's blocks read, and multiplies them with these blocks."""
    layout = topology.layout
    width_O, width_I = layout.block_shape if transposed else layout.block_shape[::-1]
    out = zeros_or_bias(input, layout.rows if transposed else layout.cols, bias)
    inputs_TBb = [_in_blocks(input_TI, width_I) for input_TI in by_matrix(input, ends)]
    outs_TO = by_matrix(out, ends)
    for line in _lines(topology, by_column=not transposed):
        gathered_TI = inputs_TBb[line.matrix].index_select(1, line.across_n).flatten(1)
        blocks_n = values.index_select(0, line.rows_n)
        weight_Ib = (blocks_n.mT if transposed else blocks_n).flatten(0, 1)
        outputs = slice(line.number * width_O, (line.number + 1) * width_O)
        out_Tb = outs_TO[line.matrix][:, outputs]
        weight_Ib = weight_Ib[:, : out_Tb.shape[1]]
        out_Tb.copy_(_multiply(gathered_TI, weight_Ib, None if bias is None else bias[outputs]))
    return out


def _sampled_by_tiles(left: Tensor, right: Tensor, topology: Topology, ends: list[int] | None) -> Tensor:
    """Multiplies line by line: its part of leftᵀ with the columns of right, gathered, that its blocks read."""
    layout = topology.layout
    bm, bn = layout.block_shape
    blocks_Nmn = left.new_zeros(topology.num_active, bm, bn)
    lefts_TR = by_matrix(left, ends)
    rights_TBb = [_in_blocks(right_TC, bn) for right_TC in by_matrix(right, ends)]
    for line in _lines(topology, by_column=False):
        left_Tb = lefts_TR[line.matrix][:, line.number * bm : (line.number + 1) * bm]
        gathered_TC = rights_TBb[line.matrix].index_select(1, line.across_n).flatten(1)
        product_bnC = (left_Tb.mT @ gathered_TC).unflatten(1, (-1, bn))
        blocks_Nmn[line.rows_n, : left_Tb.shape[1]] = product_bnC.transpose(0, 1)
    if layout.cols % bn:  # the padding of right is zero, but times inf or nan it is nan
        blocks_Nmn[topology.active_blocks() % layout.block_cols == layout.block_cols - 1, :, layout.cols % bn :] = 0
    return blocks_Nmn


_WEIGHTS_AT_ONCE = 2**20
_WEIGHTS_IN_CACHE = 2**15
"""Number of weights that a processor's cache holds together with the temporary tensors of their update."""
Chunk = tuple[slice, Location | None]


def update_all(updates: list[Update]) -> None:
    """Makes one update after another, each of them chunk by chunk."""
    for update in updates:
        if update.values.numel() == 0:
            move_nothing(update)
            continue
        begun = Begun(update)
        if update.rule.normalized is not None:
            for rows, location in _chunks(begun):
                assert location is not None
                begun.measure_units(rows, location)
        for rows, location in _chunks(begun):
            begun.move(rows, location)


def _chunks(begun: Begun) -> Iterable[Chunk]:
    """Yields the rows in chunks, with the location of each where the update needs it."""
    grad, topology = begun.grad, begun.update.topology
    weights_at_once = min(_WEIGHTS_AT_ONCE, _WEIGHTS_IN_CACHE) if grad.device.type == "cpu" else _WEIGHTS_AT_ONCE
    at_once = max(1, weights_at_once // grad[0].numel())
    if not begun.needs_locations:
        return ((rows, None) for rows in _rows(len(grad), at_once))
    if topology is None:
        return _chunks_of_plain(grad, begun.update.first_place, at_once)
    return _chunks_of_compact(topology, at_once)


def _rows(num_rows: int, at_once: int) -> Iterator[slice]:
    return (slice(first, min(first + at_once, num_rows)) for first in range(0, num_rows, at_once))


def _chunks_of_plain(grad: Tensor, first_place: int, at_once: int) -> Iterator[Chunk]:
    """Cuts a plain parameter like ``grad`` into chunks of rows that hold whole groups of codes."""
    row_size = math.prod(grad.shape[1:])
    rows_of_whole_groups = WEIGHTS_OF_A_GROUP // math.gcd(WEIGHTS_OF_A_GROUP, row_size)
    for rows in _rows(len(grad), max(1, at_once // rows_of_whole_groups) * rows_of_whole_groups):
        first, last = rows.start * row_size, rows.stop * row_size
        groups = range(first // WEIGHTS_OF_A_GROUP, -(-last // WEIGHTS_OF_A_GROUP))
        places = torch.arange(first_place + first, first_place + last, device=grad.device)
        yield rows, Location(places.view(-1, *grad.shape[1:]), None, groups, first_place)


def _chunks_of_compact(topology: Topology, at_once: int) -> Iterator[Chunk]:
    layout, positions = topology.layout, topology.positions
    if topology.group_starts is None:
        assert positions is not None
        for rows in _rows(topology.num_active, at_once):
            yield rows, Location(positions[rows].long(), layout)
        return
    for groups, rows in _groups_and_rows(topology, at_once):
        if rows.start < rows.stop:
            active = _active(topology, groups, rows) if positions is None else positions[rows].long()
            yield rows, Location(active, layout, groups)


def _groups_and_rows(topology: Topology, at_once: int) -> Iterator[tuple[range, slice]]:
    """Yields the groups of each chunk, and its rows.

    A CUDA graph takes all rows at once, since groups have other rows after a topology update. Else the starts of all
    groups are copied to the host, once for each topology.
    """
    assert topology.group_starts is not None
    if captures.is_capturing(topology.bits.device):
        yield range(topology.layout.num_groups), slice(0, topology.num_active)
        return
    starts = topology.constant("group_starts on the host", topology.group_starts.tolist)
    for first, last in _group_ranges(starts, at_once):
        yield range(first, last), slice(starts[first], starts[last])


def _group_ranges(starts: list[int], at_once: int) -> Iterator[tuple[int, int]]:
    """Yields ranges of groups that have at most ``at_once`` active blocks together, or are a single group."""
    first = 0
    while first < len(starts) - 1:
        last = max(first + 1, bisect_right(starts, starts[first] + at_once) - 1)
        yield first, last
        first = last


def _active(topology: Topology, groups: range, rows: slice) -> Tensor:
    """Returns the positions of the active single weights in some groups, by reading only the bits of these."""
    in_group = topology.layout.blocks_per_group
    weights = slice(groups.start * in_group, min(groups.stop * in_group, topology.layout.num_blocks))
    bits = topology.bits[weights.start // 8 : -(-weights.stop // 8)]
    mask = unpack_bits(bits, weights.stop - weights.start)
    return positions_of(mask, rows.stop - rows.start) + weights.start

"""Index: the lists that kernels want of a topology, one after another in one tensor. Derived, never saved.

Shape suffixes: S stacked matrices, M block rows, K block cols, N active blocks, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smet_compile.format.layout import Layout
from smet_compile.format.topology import positions_of, unpack_bits

_WEIGHTS_OF_A_GROUP = 1024


class Index(NamedTuple):
    """Views of the lists that one kind of block has; the others are None. Tiles have both sides larger than 1.

    Args:
        positions: (N,) of the active blocks, row-major: tiles and runs.
        by_column: (N,) tiles: their rows of ``values`` in order of (matrix, block column, block row).
        row_starts: (S M + 1,) tiles: the blocks of block row r (counted through all matrices) are
            ``values[row_starts[r] : row_starts[r + 1]]``.
        column_starts: (S K + 1,) tiles: the same in ``by_column``.
        group_starts: (G + 1,) single weights and runs: active blocks before group g, which is
            ``blocks_per_group`` positions.
    """

    positions: Tensor | None
    by_column: Tensor | None
    row_starts: Tensor | None
    column_starts: Tensor | None
    group_starts: Tensor | None


def blocks_per_group(layout: Layout) -> int:
    """Consecutive block positions that share the scale of a moment: a tile, or 1024 dense weights."""
    bm, bn = layout.block_shape
    return 1 if layout.tiles else max(1, _WEIGHTS_OF_A_GROUP // (bm * bn))


def num_groups(layout: Layout) -> int:
    return -(-layout.num_blocks // blocks_per_group(layout))


def _lengths(layout: Layout, num_active: int) -> tuple[int, ...]:
    """Of each list of ``Index``, in its order; 0 for those that there are not."""
    if layout.tiles:
        stacked = layout.num_matrices
        return num_active, num_active, stacked * layout.block_rows + 1, stacked * layout.block_cols + 1, 0
    return 0 if layout.single_weights else num_active, 0, 0, 0, num_groups(layout) + 1


def empty_index(layout: Layout, num_active: int, device: torch.device) -> Tensor:
    """The tensor that holds the lists, unwritten."""
    dtype = torch.int32 if layout.num_blocks < 2**31 else torch.int64
    return torch.empty(sum(_lengths(layout, num_active)), dtype=dtype, device=device)


def split_index(index: Tensor, layout: Layout, num_active: int) -> Index:
    """Views of the lists in ``index``."""
    parts = index.split(_lengths(layout, num_active))
    return Index(*(part if part.numel() else None for part in parts))


def whole_index(index: list[Tensor], topology: Tensor, layout: Layout, num_active: int) -> Tensor:
    """The one tensor in ``index``; made anew where that is empty."""
    if index:
        return index[0]
    made = empty_index(layout, num_active, topology.device)
    write_index(made, topology, layout)
    return made


def write_index(index: Tensor, topology: Tensor, layout: Layout) -> None:
    """Fills ``index`` with the lists of the active blocks in ``topology``, the packed bits."""
    mask = unpack_bits(topology, layout.num_blocks)
    if layout.tiles:
        _write_tiles(index, mask, layout)
        return
    over = -layout.num_blocks % blocks_per_group(layout)
    in_group = torch.nn.functional.pad(mask, (0, over)).view(-1, blocks_per_group(layout)).sum(1)
    group_starts = index[-(in_group.numel() + 1) :]
    group_starts[0] = 0
    torch.cumsum(in_group, 0, out=group_starts[1:])
    if not layout.single_weights:
        index[: -group_starts.numel()] = positions_of(mask)


def _write_tiles(index: Tensor, mask: Tensor, layout: Layout) -> None:
    positions = positions_of(mask)
    row, col = positions // layout.block_cols, positions % layout.block_cols
    column = row // layout.block_rows * layout.block_cols + col
    lists = split_index(index, layout, positions.numel())
    for target, source in (
        (lists.positions, positions),
        (lists.by_column, column.argsort(stable=True)),
        (lists.row_starts, _starts(row, layout.num_matrices * layout.block_rows)),
        (lists.column_starts, _starts(column, layout.num_matrices * layout.block_cols)),
    ):
        assert target is not None
        target.copy_(source)


def _starts(line_N: Tensor, num_lines: int) -> Tensor:
    counts = torch.bincount(line_N, minlength=num_lines)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))

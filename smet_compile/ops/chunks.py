"""Chunks: the rows of a parameter that one update takes at once, so that it makes little on the side."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from smet_compile.format import Layout, blocks_per_group, positions_of, split_index, unpack_bits
from smet_compile.format.blocks import dense_positions
from smet_compile.ops.codes import WEIGHTS_OF_A_GROUP, Groups


class Place(NamedTuple):
    """Where some rows lie in the dense weight: whole groups.

    Args:
        blocks: positions (n,) of their blocks; of a plain parameter those of its entries, in the shape of the rows.
        layout: of a compact weight; None for a plain parameter.
    """

    blocks: Tensor
    layout: Layout | None

    @property
    def positions(self) -> Tensor:
        """Of every entry in the flat dense weight, in the shape of the rows."""
        if self.layout is None or self.layout.single_weights:
            return self.blocks
        return dense_positions(self.blocks, self.layout)

    @property
    def groups(self) -> Groups:
        if self.layout is None:
            return _consecutive(self.blocks // WEIGHTS_OF_A_GROUP)
        if self.layout.tiles:
            return Groups(self.blocks, torch.arange(len(self.blocks), device=self.blocks.device).view(-1, 1, 1))
        group = self.blocks // blocks_per_group(self.layout)
        return _consecutive(group if self.layout.single_weights else group.view(-1, 1, 1))


Chunk = tuple[slice, Place | None]


def _consecutive(group: Tensor) -> Groups:
    """From the ascending numbers of the groups, by block."""
    first, last = int(group.view(-1)[0]), int(group.view(-1)[-1])
    return Groups(torch.arange(first, last + 1, device=group.device), group - first)


def _rows(num_rows: int, at_once: int) -> Iterator[slice]:
    return (slice(first, min(first + at_once, num_rows)) for first in range(0, num_rows, at_once))


def unlocated_chunks(num_rows: int, at_once: int) -> Iterator[Chunk]:
    """Where nothing hangs on the positions."""
    return ((rows, None) for rows in _rows(num_rows, at_once))


def plain_chunks(shape: torch.Size, device: torch.device, at_once: int) -> Iterator[Chunk]:
    """Of a plain parameter of this shape: as many rows as hold whole groups."""
    row_size = math.prod(shape[1:])
    together = WEIGHTS_OF_A_GROUP // math.gcd(WEIGHTS_OF_A_GROUP, row_size)
    for rows in _rows(shape[0], max(1, at_once // together) * together):
        entries = torch.arange(rows.start * row_size, rows.stop * row_size, device=device)
        yield rows, Place(entries.view(-1, *shape[1:]), None)


def compact_chunks(
    topology: Tensor, index: list[Tensor], layout: Layout, num_active: int, at_once: int
) -> Iterator[Chunk]:
    """Of a compact weight with ``num_active`` blocks."""
    lists = split_index(index[0], layout, num_active)
    if lists.group_starts is None:
        assert lists.positions is not None
        for rows in _rows(num_active, at_once):
            yield rows, Place(lists.positions[rows].long(), layout)
        return
    starts = lists.group_starts.tolist()
    for first, last in _group_ranges(starts, at_once):
        rows = slice(starts[first], starts[last])
        if rows.start < rows.stop:
            if lists.positions is None:
                yield rows, Place(_active(topology, layout, first, last), layout)
            else:
                yield rows, Place(lists.positions[rows].long(), layout)


def _group_ranges(starts: list[int], at_once: int) -> Iterator[tuple[int, int]]:
    """As many groups as have up to ``at_once`` active blocks together, and one at least."""
    first = 0
    while first < len(starts) - 1:
        last = max(first + 1, bisect_right(starts, starts[first] + at_once) - 1)
        yield first, last
        first = last


def _active(topology: Tensor, layout: Layout, first: int, last: int) -> Tensor:
    """Positions of the active single weights in some groups, from the bits of those alone."""
    in_group = blocks_per_group(layout)
    weights = slice(first * in_group, min(last * in_group, layout.num_blocks))
    bits = topology[weights.start // 8 : -(-weights.stop // 8)]
    return positions_of(unpack_bits(bits, weights.stop - weights.start)) + weights.start

"""The kernel named "torch" for updates: the law, a few rows at a time, so that it makes little on the side."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from smet_compile.format import WEIGHTS_OF_A_GROUP, Topology, positions_of, unpack_bits
from smet_compile.ops.law_of_updates import Begun, Location
from smet_compile.ops.updates import Update

_WEIGHTS_AT_ONCE = 2**20
_WEIGHTS_IN_CACHE = 2**15
"""As many weights as a processor's cache holds with all that is made of them on the way."""
Chunk = tuple[slice, Location | None]


def update_all(updates: list[Update]) -> None:
    """Makes one update after another."""
    for update in updates:
        if update.values.numel() == 0:
            update.step.add_(1)
            continue
        begun = Begun(update)
        if update.rule.normalized is not None:
            for rows, location in _chunks(begun):
                assert location is not None
                begun.measure_units(rows, location)
        for rows, location in _chunks(begun):
            begun.move(rows, location)


def _chunks(begun: Begun) -> Iterable[Chunk]:
    """Cuts the rows into parts; says where each part lies if anything depends on it."""
    grad, topology = begun.grad, begun.update.topology
    weights_at_once = min(_WEIGHTS_AT_ONCE, _WEIGHTS_IN_CACHE) if grad.device.type == "cpu" else _WEIGHTS_AT_ONCE
    at_once = max(1, weights_at_once // grad[0].numel())
    if not begun.needs_locations:
        return ((rows, None) for rows in _rows(len(grad), at_once))
    if topology is None:
        return _chunks_of_plain(grad.shape, grad.device, at_once)
    return _chunks_of_compact(topology, at_once)


def _rows(num_rows: int, at_once: int) -> Iterator[slice]:
    return (slice(first, min(first + at_once, num_rows)) for first in range(0, num_rows, at_once))


def _chunks_of_plain(shape: torch.Size, device: torch.device, at_once: int) -> Iterator[Chunk]:
    """Cuts a plain parameter of this shape into as many rows as hold whole groups."""
    row_size = math.prod(shape[1:])
    together = WEIGHTS_OF_A_GROUP // math.gcd(WEIGHTS_OF_A_GROUP, row_size)
    for rows in _rows(shape[0], max(1, at_once // together) * together):
        entries = torch.arange(rows.start * row_size, rows.stop * row_size, device=device)
        yield rows, Location(entries.view(-1, *shape[1:]), None)


def _chunks_of_compact(topology: Topology, at_once: int) -> Iterator[Chunk]:
    layout, positions = topology.layout, topology.positions
    if topology.group_starts is None:
        assert positions is not None
        for rows in _rows(topology.num_active, at_once):
            yield rows, Location(positions[rows].long(), layout)
        return
    starts = topology.constant("group_starts on the host", topology.group_starts.tolist)
    for first, last in _group_ranges(starts, at_once):
        rows = slice(starts[first], starts[last])
        if rows.start < rows.stop:
            active = _active(topology, first, last) if positions is None else positions[rows].long()
            yield rows, Location(active, layout)


def _group_ranges(starts: list[int], at_once: int) -> Iterator[tuple[int, int]]:
    """Yields as many groups as have up to ``at_once`` active blocks together, and one at least."""
    first = 0
    while first < len(starts) - 1:
        last = max(first + 1, bisect_right(starts, starts[first] + at_once) - 1)
        yield first, last
        first = last


def _active(topology: Topology, first: int, last: int) -> Tensor:
    """Returns the positions of the active single weights in some groups, from the bits of those alone."""
    in_group = topology.layout.blocks_per_group
    weights = slice(first * in_group, min(last * in_group, topology.layout.num_blocks))
    bits = topology.bits[weights.start // 8 : -(-weights.stop // 8)]
    return positions_of(unpack_bits(bits, weights.stop - weights.start)) + weights.start

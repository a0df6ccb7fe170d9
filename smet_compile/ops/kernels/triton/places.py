"""Lists where single weights lie, for the noise of their rounding: a thread that holds an entry must know its position.

A position is 16 bits of place within a span of 2^16 dense weights, and the number of the span. The spans of all entries
follow from that of the first in a piece, since entries are in order of position. The lists are made of the bits in
every step and freed after it: two bytes a weight are not kept, and a CUDA graph follows a topology that has changed.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from smet_compile.ops.kernels.triton import adamw_step as at
from smet_compile.ops.kernels.triton.adamw_step import LANES, Row, pointer
from smet_compile.ops.kernels.triton.supports import on_device

_SPAN_BITS = tl.constexpr(at.SPAN.value.bit_length() - 1)
_ALIGNED_TO = 8
"""Places before which a parameter's list begins: 16 bytes."""


class Places(NamedTuple):
    """Holds the positions of the single weights of a launch.

    Args:
        places: int16, read as unsigned: the position of each modulo 2^16. spans: int32: the span of the first weight
            in each piece of ENTRIES_OF_A_PIECE.
    """

    places: Tensor
    spans: Tensor


def with_list_starts(rows: Sequence[Row]) -> tuple[list[Row], tuple[int, int]]:
    """Says in each row where its lists begin; returns the rows, and the lengths of both lists."""
    lengths = [-(-row.numel // _ALIGNED_TO) * _ALIGNED_TO if row.topology else 0 for row in rows]
    pieces = [-(-row.numel // at.ENTRIES_OF_A_PIECE.value) if row.topology else 0 for row in rows]
    *places, num_places = accumulate(lengths, initial=0)
    *spans, num_spans = accumulate(pieces, initial=0)
    numbered = zip(rows, places, spans, strict=True)
    return [row._replace(places_start=place, spans_start=span) for row, place, span in numbered], (
        num_places,
        num_spans,
    )


def list_places(
    rows: Tensor, groups: Tensor, lengths: tuple[int, int], device: torch.device, index: tl.dtype
) -> Places:
    """Lists the positions of a launch's single weights.

    Args:
        rows: the table. groups: (programs, 2) int32, the parameter and the group of 1,024 dense weights of each.
        lengths: those of both lists. index: the dtype of the topologies' lists.
    """
    num_places, num_spans = lengths
    places = torch.empty(num_places, dtype=torch.int16, device=device)
    spans = torch.empty(num_spans, dtype=torch.int32, device=device)
    if len(groups):
        on_device(write_places, device)[(len(groups),)](rows, groups, places, spans, INDEX=index, num_warps=4)
    return Places(places, spans)


@triton.jit
def write_places(table, work, places, spans, INDEX: tl.constexpr):
    """Writes the places of the active ones among LANES dense weights, and the spans of those that begin a piece."""
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(work + 2 * program) * at.NUM_COLUMNS
    group = tl.load(work + 2 * program + 1)
    first = tl.load(pointer(row, at.GROUP_STARTS, INDEX) + group).to(tl.int64)
    lane = tl.arange(0, LANES)
    position = group.to(tl.int64) * LANES + lane
    inside = position < tl.load(row + at.NUM_BLOCKS)
    byte = tl.load(pointer(row, at.TOPOLOGY, tl.uint8) + position // 8, mask=inside, other=0).to(tl.int32)
    bit = (byte >> (lane & 7)) & 1
    entry = first + tl.cumsum(bit, 0) - bit
    active = bit == 1
    place = (position & (at.SPAN - 1)).to(tl.int16)
    tl.store(places + tl.load(row + at.PLACES_START) + entry, place, mask=active)
    begins = active & (entry % at.ENTRIES_OF_A_PIECE == 0)
    piece = tl.load(row + at.SPANS_START) + entry // at.ENTRIES_OF_A_PIECE
    tl.store(spans + piece, (position >> _SPAN_BITS).to(tl.int32), mask=begins)

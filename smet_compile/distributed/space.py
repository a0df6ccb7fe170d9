"""Plans how tensors go from one layout over ranks to another: intersections of regions, computed alike on every rank.

Every tensor of a run has logical rows, and columns where its second dimension may be cut. A layout says which region of
them each rank stores. A compact weight that tensor parallelism cuts is stored part by part, in another order than the
rows of the whole weight have; ``order`` says which. Nothing here needs a process group.

The method is that of DynaTrain (arXiv 2605.18815): a virtual space of parameters, and a plan by intersection.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LogicalRows = range | Tensor
"""Logical rows in ascending order: consecutive ones, or any as int64."""


@dataclass(frozen=True)
class Region:
    """Describes what one rank stores of a tensor: the rows start to stop, and the columns left to right.

    ``right`` is None where the tensor has no second dimension that any layout cuts.
    """

    start: int
    stop: int
    left: int = 0
    right: int | None = None


@dataclass(frozen=True, eq=False)
class Placed:
    """Says where a tensor lies.

    Args:
        regions: by rank; a rank that stores nothing of it may be missing. Several ranks may store the same.
        order: (rows,) int64, the logical row of each stored row; None where they are the same.
    """

    regions: Mapping[int, Region]
    order: Tensor | None = None
    _sorted: dict[Region, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _holders: dict[Region, list[int]] = field(default_factory=dict, repr=False)

    def logical(self, rank: int) -> LogicalRows:
        """Returns the logical rows that a rank stores."""
        region = self.regions[rank]
        return range(region.start, region.stop) if self.order is None else self._of(region)[0]

    def stored(self, rank: int, rows: LogicalRows) -> slice | Tensor:
        """Returns where a rank stores these logical rows, counted from its first."""
        region = self.regions[rank]
        if self.order is not None:
            logical, where = self._of(region)
            wanted = torch.arange(rows.start, rows.stop) if isinstance(rows, range) else rows
            return where[torch.searchsorted(logical, wanted)]
        if isinstance(rows, range):
            return slice(rows.start - region.start, rows.stop - region.start)
        return rows - region.start

    def source_of(self, region: Region, rank: int) -> int:
        """Returns from which of the ranks that store ``region`` another one takes it: itself, or they take turns."""
        if not self._holders:
            for holder in sorted(self.regions):
                self._holders.setdefault(self.regions[holder], []).append(holder)
        holders = self._holders[region]
        return rank if rank in holders else holders[rank % len(holders)]

    def _of(self, region: Region) -> tuple[Tensor, Tensor]:
        assert self.order is not None
        if region not in self._sorted:
            ascending, where = self.order[region.start : region.stop].sort()
            self._sorted[region] = ascending, where
        return self._sorted[region]


@dataclass(frozen=True)
class Item:
    """Describes a tensor that changes its layout.

    Args:
        shape: of the whole, with its rows in stored order. row_bytes, and width: of a row in all columns.
        source: where it lies.
        target: where it is to lie.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Placed
    target: Placed

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Returns the length of the second dimension, 1 where there is none."""
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def most_copies(self) -> int:
        """Returns how many ranks are to store the same, at most."""
        return max(Counter(self.target.regions.values()).values(), default=0)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def local_shape(self, placed: Placed, rank: int) -> tuple[int, ...]:
        """Returns the shape of what a rank stores."""
        region = placed.regions[rank]
        if not self.shape:
            return () if region.stop > region.start else (0,)
        rows = (region.stop - region.start,)
        if region.right is None:
            return rows + self.shape[1:]
        return (*rows, region.right - region.left, *self.shape[2:])

    def bytes_at(self, placed: Placed, rank: int) -> int:
        """Returns the bytes that a rank stores; 0 where it stores nothing."""
        return math.prod(self.local_shape(placed, rank)) * self.dtype.itemsize if rank in placed.regions else 0


@dataclass(frozen=True, eq=False)
class Piece:
    """Describes what goes from one rank to another: logical rows, and columns of the whole tensor.

    ``right`` is None where all columns go.
    """

    rows: LogicalRows
    left: int = 0
    right: int | None = None

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def num_bytes(self, item: Item) -> int:
        columns = item.width if self.right is None else self.right - self.left
        return self.num_rows * item.row_bytes // max(1, item.width) * columns

    def index(self, item: Item, placed: Placed, rank: int) -> tuple[slice | Tensor, slice]:
        """Returns which rows and columns they are of the tensor that a rank stores."""
        region = placed.regions[rank]
        rows = placed.stored(rank, self.rows)
        if self.right is None:
            return rows, slice(None)
        left = 0 if region.right is None else region.left
        return rows, slice(self.left - left, self.right - left)


def piece(item: Item, sender: int, receiver: int, low: int, high: int) -> Piece | None:
    """Returns what goes from one rank to another of the logical rows from ``low`` to ``high``; None for nothing."""
    source, target = item.source.regions.get(sender), item.target.regions.get(receiver)
    if source is None or target is None or item.source.source_of(source, receiver) != sender:
        return None
    rows = _common(item.source.logical(sender), item.target.logical(receiver), low, high)
    if not len(rows):
        return None
    if source.right is None and target.right is None:
        return Piece(rows)
    left = max(source.left, target.left)
    right = min(each.right for each in (source, target) if each.right is not None)
    return Piece(rows, left, right) if left < right else None


def _common(first: LogicalRows, second: LogicalRows, low: int, high: int) -> LogicalRows:
    """Returns the logical rows that are in both, from ``low`` to ``high``."""
    if isinstance(first, range) and isinstance(second, range):
        start = max(first.start, second.start, low)
        return range(start, max(start, min(first.stop, second.stop, high)))
    if isinstance(first, range):
        first, second = second, first
    assert isinstance(first, Tensor)
    if isinstance(second, range):
        low, high = max(low, second.start), min(high, second.stop)
    begin, end = torch.searchsorted(first, torch.tensor([low, max(low, high)])).tolist()
    within = first[begin:end]
    return within if isinstance(second, range) else within[torch.isin(within, second, assume_unique=True)]


Window = list[tuple[Item, int, int]]
"""Items, each with the first of its logical rows and the end of them."""


def windows(items: Sequence[Item], chunk_bytes: int) -> Iterator[Window]:
    """Yields all logical rows of all items in order, in windows of at most ``chunk_bytes``, or of one row."""
    window: Window = []
    filled = 0
    for item in items:
        low = 0
        while True:
            room = max(0, chunk_bytes - filled) // max(1, item.row_bytes)
            high = min(item.num_rows, low + (room or (0 if window else 1)))
            if high > low or item.num_rows == 0:
                window.append((item, low, high))
                filled += (high - low) * item.row_bytes
            if high >= item.num_rows:
                break
            yield window
            window, filled, low = [], 0, high
    if window:
        yield window


@dataclass(frozen=True)
class SwitchPlan:
    """Tells what a switch from one layout to another costs.

    Args:
        sent: bytes by (sender, receiver), without what stays on its rank.
        lower_bound: bytes that ranks need and do not store: no plan moves fewer.
        stored_before: bytes that each rank stores before, by rank.
        stored_after: bytes that each rank stores after, by rank.
        peak: the most bytes that a rank stores meanwhile, by rank.
    """

    sent: dict[tuple[int, int], int]
    lower_bound: int
    stored_before: dict[int, int]
    stored_after: dict[int, int]
    peak: dict[int, int]

    @property
    def total_sent(self) -> int:
        return sum(self.sent.values())

    def seconds(self, bytes_per_second: float) -> float:
        """Estimates the time of the transfer: that of the rank which sends or receives most."""
        of_rank: dict[tuple[int, bool], int] = defaultdict(int)
        for (sender, receiver), count in self.sent.items():
            of_rank[sender, True] += count
            of_rank[receiver, False] += count
        return max(of_rank.values(), default=0) / bytes_per_second

    def __str__(self) -> str:
        lines = [f"{sender} -> {receiver}: {count:,} bytes" for (sender, receiver), count in sorted(self.sent.items())]
        total = f"{self.total_sent:,} bytes sent, at least {self.lower_bound:,} needed"
        return "\n".join([*lines, total, f"at most {max(self.peak.values(), default=0):,} bytes on a rank meanwhile"])


def plan_switch(items: Sequence[Item], chunk_bytes: int = 1 << 26) -> SwitchPlan:
    """Plans a switch without a process group.

    Raises:
        ValueError: some part of a tensor that a rank is to store lies nowhere, or would come twice.
    """
    ranks = sorted({rank for item in items for each in (item.source, item.target) for rank in each.regions})
    sent: dict[tuple[int, int], int] = defaultdict(int)
    needed = 0
    for item in items:
        for receiver in item.target.regions:
            pieces = {sender: piece(item, sender, receiver, 0, item.num_rows) for sender in item.source.regions}
            found = {sender: each.num_bytes(item) for sender, each in pieces.items() if each is not None}
            wanted = item.bytes_at(item.target, receiver)
            if sum(found.values()) != wanted:
                raise ValueError(
                    f"{item.name}: expected {wanted:,} bytes for rank {receiver} from the ranks that store it, got "
                    f"{sum(found.values()):,}; give layouts that cover the whole tensor, each part once or as a copy"
                )
            needed += wanted - found.pop(receiver, 0)
            for sender, count in found.items():
                sent[sender, receiver] += count
    before = {rank: sum(item.bytes_at(item.source, rank) for item in items) for rank in ranks}
    after = {rank: sum(item.bytes_at(item.target, rank) for item in items) for rank in ranks}
    return SwitchPlan(dict(sent), needed, before, after, _peaks(items, ranks, before, chunk_bytes))


def _peaks(items: Sequence[Item], ranks: list[int], before: dict[int, int], chunk_bytes: int) -> dict[int, int]:
    """Returns the most bytes that each rank stores at a time, as if it received all of a window, and sent it to all.

    What a rank is to store is made when its first rows come, and its source is freed when its last rows have gone.
    """
    now, peak = dict(before), dict(before)
    for window in windows(items, chunk_bytes):
        buffers = sum((high - low) * item.row_bytes * (1 + item.most_copies) for item, low, high in window)
        for rank in ranks:
            now[rank] += sum(item.bytes_at(item.target, rank) for item, low, _ in window if low == 0)
            peak[rank] = max(peak[rank], now[rank] + buffers)
            now[rank] -= sum(item.bytes_at(item.source, rank) for item, _, high in window if high >= item.num_rows)
    return peak

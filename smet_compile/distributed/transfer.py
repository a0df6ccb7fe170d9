"""Executes a plan: sends pieces of tensors from rank to rank, window by window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from smet_compile.distributed.space import Item, Piece, Placed, Window, piece, windows
from smet_compile.shards import named


class Meter:
    """Counts the bytes of state and of buffers that this rank has in memory during a transfer, and what it sends."""

    def __init__(self) -> None:
        self.now = self.peak = self.sent = self.num_calls = 0

    def add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


class Transfer:
    """Moves tensors to their new layout, over all ranks of a process group.

    Args:
        items: what moves, in the same order on all ranks. device: where this rank's tensors are.
        read: returns what this rank stores of an item; None where it stores nothing. release: frees it, once sent.
        keep: takes what this rank is to store of an item, once it is complete.
    """

    def __init__(
        self,
        items: Sequence[Item],
        device: torch.device,
        read: Callable[[str], Tensor | None],
        release: Callable[[str], None],
        keep: Callable[[str, Tensor], None],
        group: Any = None,
    ) -> None:
        self._items, self._device, self._group = items, device, group
        self._read, self._release, self._keep = read, release, keep
        self._rank, self._size = distributed.get_rank(group), distributed.get_world_size(group)
        self._made: dict[str, Tensor] = {}
        self.meter = Meter()

    def run(self, chunk_bytes: int) -> None:
        """Moves everything, at most ``chunk_bytes`` at a time; every rank has to call."""
        for item in self._items:
            here = self._read(item.name)
            self.meter.add(0 if here is None else here.nbytes)
        for window in windows(self._items, chunk_bytes):
            for item, low, _ in window:
                if low == 0 and self._rank in item.target.regions:
                    shape = item.local_shape(item.target, self._rank)
                    self._made[item.name] = torch.empty(shape, dtype=item.dtype, device=self._device)
                    self.meter.add(self._made[item.name].nbytes)
            self._send(window)
            for item, _, high in window:
                if high >= item.num_rows:
                    self._finish(item)

    def _finish(self, item: Item) -> None:
        here = self._read(item.name)
        if here is not None:
            self.meter.add(-here.nbytes)
            self._release(item.name)
        if item.name in self._made:
            self._keep(item.name, self._made.pop(item.name))

    def _send(self, window: Window) -> None:
        """Sends the rows of a window from every rank to every other, and copies those that stay."""
        sent: list[list[Tensor]] = [[] for _ in range(self._size)]
        received: list[list[tuple[Item, Piece]]] = [[] for _ in range(self._size)]
        for item, low, high in window:
            for rank in range(self._size):
                goes, comes = (piece(item, *pair, low, high) for pair in ((self._rank, rank), (rank, self._rank)))
                if goes is not None:
                    sent[rank].append(self._taken(item, goes))
                if comes is not None:
                    received[rank].append((item, comes))
        for part, (item, each) in zip(sent[self._rank], received[self._rank], strict=True):
            self._write(item, each, part)
        sent[self._rank], received[self._rank] = [], []
        packed = [torch.cat([_as_bytes(part) for part in parts]) if parts else self._empty(0) for parts in sent]
        counts = [sum(each.num_bytes(item) for item, each in parts) for parts in received]
        outgoing, arrived = torch.cat(packed), self._empty(sum(counts))
        self.meter.add(outgoing.numel() + arrived.numel())
        self.meter.sent += outgoing.numel()
        self.meter.num_calls += 1
        with named("moving state to another layout"):
            distributed.all_to_all_single(arrived, outgoing, counts, [len(each) for each in packed], group=self._group)
        offset = 0
        for item, each in (entry for parts in received for entry in parts):
            size = each.num_bytes(item)
            self._write(item, each, arrived[offset : offset + size])
            offset += size
        self.meter.add(-outgoing.numel() - arrived.numel())

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _taken(self, item: Item, each: Piece) -> Tensor:
        here = self._read(item.name)
        assert here is not None
        return _view(here, item, each, item.source, self._rank)

    def _write(self, item: Item, each: Piece, part: Tensor) -> None:
        made = self._made[item.name]
        rows, columns = each.index(item, item.target, self._rank)
        table = _as_table(made)
        wanted = table[rows][:, columns] if isinstance(rows, slice) else None
        shape = (each.num_rows, *_width_of(table, columns))
        new = (
            part.clone().view(item.dtype).view(shape)
            if part.dtype == torch.uint8 != item.dtype
            else part.reshape(shape)
        )
        if wanted is not None:
            wanted.copy_(new)
        else:
            table[rows, columns] = new


def _as_table(tensor: Tensor) -> Tensor:
    """Returns a view with at least two dimensions: rows, columns, and whatever else a column has."""
    if tensor.dim() == 0:
        return tensor.view(1, 1)
    return tensor.unsqueeze(1) if tensor.dim() == 1 else tensor


def _width_of(table: Tensor, columns: slice) -> tuple[int, ...]:
    return (len(range(*columns.indices(table.shape[1]))), *table.shape[2:])


def _view(here: Tensor, item: Item, each: Piece, placed: Placed, rank: int) -> Tensor:
    rows, columns = each.index(item, placed, rank)
    return _as_table(here)[rows][:, columns]


def _as_bytes(part: Tensor) -> Tensor:
    """Returns a flat copy as uint8: neither gloo nor NCCL sends 16-bit integers."""
    return part.contiguous().view(-1).view(torch.uint8)

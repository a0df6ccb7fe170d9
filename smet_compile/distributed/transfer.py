"""Executes a plan: sends pieces of tensors from rank to rank, window by window.

Ranks send in one of two ways. By ``"pairs"`` they exchange in rounds, numbered from 1 up to the next power of two: in
each, a rank's partner is the exclusive or of its own number and the round's, as in DynaTrain (arXiv 2605.18815). Large
pieces go straight from and to the memory of their tensors. ``"all_to_all"`` packs a window into one buffer, and calls
``all_to_all_single`` once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from smet_compile.distributed.space import Item, Piece, Window, piece, windows
from smet_compile.shards import named

Way = Literal["pairs", "all_to_all"]
WAYS: tuple[Way, ...] = ("pairs", "all_to_all")
_SMALL_BYTES = 1 << 16
"""Pieces of fewer bytes are packed into one message."""
Pieces = list[tuple[Item, Piece]]
_DOING = "moving state to another layout"


class Meter:
    """Counts the bytes of state and of buffers that this rank has in memory during a transfer, and what it sends."""

    def __init__(self) -> None:
        self.now = self.peak = self.sent = self.num_messages = 0

    def add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


class Transfer:
    """Moves tensors to their new layout, over all ranks of a process group.

    Args:
        items: what moves, in the same order on all ranks.
        device: the device of this rank's tensors.
        read: returns what this rank stores of an item, contiguous; None where it stores nothing.
        keep: takes what this rank is to store of an item, once it is complete.
        release: frees what this rank stores of an item, once sent; None keeps it.
        way: how ranks send; see the module.
    """

    def __init__(
        self,
        items: Sequence[Item],
        device: torch.device,
        read: Callable[[str], Tensor | None],
        keep: Callable[[str, Tensor], None],
        release: Callable[[str], None] | None = None,
        way: Way = "pairs",
    ) -> None:
        self._items, self._device = items, device
        self._read, self._release, self._keep = read, release, keep
        self._send = self._send_in_pairs if way == "pairs" else self._send_at_once
        self._rank, self._size = distributed.get_rank(), distributed.get_world_size()
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
            self._copy(window)
            self._send(window)
            for item, _, high in window:
                if high >= item.num_rows:
                    self._finish(item)

    def _finish(self, item: Item) -> None:
        here = self._read(item.name)
        if here is not None and self._release is not None:
            self.meter.add(-here.nbytes)
            self._release(item.name)
        if item.name in self._made:
            self._keep(item.name, self._made.pop(item.name))

    def _copy(self, window: Window) -> None:
        """Copies what this rank stores in both layouts."""
        for item, each in self._pieces(window, self._rank, self._rank):
            self._store(item, each, self._taken(item, each))

    def _pieces(self, window: Window, sender: int, receiver: int) -> Pieces:
        found = ((item, piece(item, sender, receiver, low, high)) for item, low, high in window)
        return [(item, each) for item, each in found if each is not None]

    def _send_in_pairs(self, window: Window) -> None:
        """Exchanges the rows of a window with one rank after the other."""
        for number in range(1, 1 << (self._size - 1).bit_length()):
            partner = self._rank ^ number
            if partner < self._size:
                self._exchange(window, partner)

    def _exchange(self, window: Window, partner: int) -> None:
        goes, comes = self._pieces(window, self._rank, partner), self._pieces(window, partner, self._rank)
        calls: list[tuple[Any, Tensor]] = []
        buffers = 0
        for item, each in _large(goes):
            part = self._taken(item, each)
            buffers += 0 if part.is_contiguous() else part.nbytes
            calls.append((distributed.isend, _as_bytes(part)))
        packed, small = self._packed(_small(goes)), self._empty(_num_bytes(_small(comes)))
        arrived: list[tuple[Item, Piece, Tensor]] = []
        for item, each in _large(comes):
            place = self._place(item, each)
            if place is None or not place.is_contiguous():
                place = self._empty(each.num_bytes(item))
                buffers += place.nbytes
                arrived.append((item, each, place))
            calls.append((distributed.irecv, _as_bytes(place)))
        calls += [(distributed.isend, packed)] if packed.numel() else []
        calls += [(distributed.irecv, small)] if small.numel() else []
        if not calls:
            return
        buffers += packed.numel() + small.numel()
        self.meter.add(buffers)
        self.meter.sent += _num_bytes(goes)
        self.meter.num_messages += len(calls)
        with named(_DOING):
            works = distributed.batch_isend_irecv([distributed.P2POp(call, part, partner) for call, part in calls])
            for work in works:
                work.wait()
        self._unpack(_small(comes), small)
        for item, each, part in arrived:
            self._store(item, each, _typed(part, item.dtype))
        self.meter.add(-buffers)

    def _send_at_once(self, window: Window) -> None:
        """Sends the rows of a window from every rank to every other."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        goes = {rank: self._pieces(window, self._rank, rank) for rank in others}
        comes = {rank: self._pieces(window, rank, self._rank) for rank in others}
        counts = [[_num_bytes(parts.get(rank, [])) for rank in range(self._size)] for parts in (goes, comes)]
        packed = self._packed([part for rank in others for part in goes[rank]])
        arrived = self._empty(sum(counts[1]))
        self.meter.add(packed.numel() + arrived.numel())
        self.meter.sent += packed.numel()
        self.meter.num_messages += 1
        with named(_DOING):
            distributed.all_to_all_single(arrived, packed, counts[1], counts[0])
        self._unpack([part for rank in others for part in comes[rank]], arrived)
        self.meter.add(-packed.numel() - arrived.numel())

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _packed(self, pieces: Pieces) -> Tensor:
        """Returns pieces as bytes, one after the other: neither gloo nor NCCL sends 16-bit integers."""
        packed, offset = self._empty(_num_bytes(pieces)), 0
        for item, each in pieces:
            size = each.num_bytes(item)
            packed[offset : offset + size].copy_(_as_bytes(self._taken(item, each)))
            offset += size
        return packed

    def _unpack(self, pieces: Pieces, packed: Tensor) -> None:
        offset = 0
        for item, each in pieces:
            size = each.num_bytes(item)
            self._store(item, each, _typed(packed[offset : offset + size], item.dtype))
            offset += size

    def _taken(self, item: Item, each: Piece) -> Tensor:
        here = self._read(item.name)
        assert here is not None
        rows, columns = each.index(item, item.source, self._rank)
        return _as_table(here)[rows][:, columns]

    def _place(self, item: Item, each: Piece) -> Tensor | None:
        """Returns a view of where a piece is to be stored; None where its rows are not consecutive."""
        rows, columns = each.index(item, item.target, self._rank)
        return _as_table(self._made[item.name])[rows][:, columns] if isinstance(rows, slice) else None

    def _store(self, item: Item, each: Piece, part: Tensor) -> None:
        place = self._place(item, each)
        if place is not None:
            place.copy_(part.reshape(place.shape))
            return
        rows, columns = each.index(item, item.target, self._rank)
        table = _as_table(self._made[item.name])
        width = len(range(*columns.indices(table.shape[1])))
        table[rows, columns] = part.reshape(each.num_rows, width, *table.shape[2:])


def _num_bytes(pieces: Pieces) -> int:
    return sum(each.num_bytes(item) for item, each in pieces)


def _small(pieces: Pieces) -> Pieces:
    return [(item, each) for item, each in pieces if each.num_bytes(item) < _SMALL_BYTES]


def _large(pieces: Pieces) -> Pieces:
    return [(item, each) for item, each in pieces if each.num_bytes(item) >= _SMALL_BYTES]


def _as_table(tensor: Tensor) -> Tensor:
    """Returns a view with at least two dimensions: rows, columns, and whatever else a column has."""
    if tensor.dim() == 0:
        return tensor.view(1, 1)
    return tensor.unsqueeze(1) if tensor.dim() == 1 else tensor


def _as_bytes(part: Tensor) -> Tensor:
    """Returns the bytes of a tensor, flat: a view where it is contiguous."""
    return part.contiguous().view(-1).view(torch.uint8)


def _typed(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns bytes as another dtype; a copy where they do not begin where that dtype may."""
    is_aligned = part.storage_offset() % dtype.itemsize == 0
    return (part if is_aligned else part.clone()).view(dtype)

"""Describes which blocks of a weight are active, as a bitmap and as lists that kernels read.

The bitmap takes one bit per block and is all that a checkpoint stores. The lists are derived from it, so that a kernel
finds the row of ``values`` for a block, and the block for a row, without a search.

Shape suffixes: S stacked matrices, M block rows, K block cols, N active blocks, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from smet_compile.format.layout import Layout

_BITS_TO_TOP_BYTE = sum(1 << (56 - 7 * bit) for bit in range(8))
"""A product with this number moves bit 8 j to bit 56 + j."""
_WORDS_AT_ONCE = 2**18
_MIX = -0x61C8864680B583EB
"""An odd number whose bits have no pattern (2^64 over the golden ratio, as a signed number)."""


_cached_bits: dict[torch.device, Tensor] = {}


def _bits_of_byte(device: torch.device) -> Tensor:
    """Returns (256,) int64 on ``device``: eight 0/1 bytes each, so that one gather expands eight blocks."""
    if device not in _cached_bits:
        bits = _make_bits(device)
        if type(bits) is not Tensor:  # a fake tensor, made while something is traced
            return bits
        _cached_bits[device] = bits
    return _cached_bits[device]


def _make_bits(device: torch.device) -> Tensor:
    byte = torch.arange(256, device=device)
    bits = (byte[:, None] >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).squeeze(1)


def unpack_bits(bits: Tensor, num_blocks: int) -> Tensor:
    """Expands bits (ceil(num_blocks / 8),) uint8 to a mask (num_blocks,) bool. Bit j of byte i is block 8 i + j."""
    return _bits_of_byte(bits.device).index_select(0, bits.int()).view(torch.bool)[:num_blocks]


def pack_bits(mask: Tensor) -> Tensor:
    """Packs a mask (num_blocks,) bool into bits (ceil(num_blocks / 8),) uint8; spare bits are zero."""
    eight = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(torch.int64)
    return (eight * _BITS_TO_TOP_BYTE >> 56).to(torch.uint8)  # eight bytes of 0 or 1, read as one number


def count_active(bits: Tensor) -> int:
    """Returns the number of active blocks, read from the bits; waits for the device."""
    words = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(torch.int64)
    return int(sum(_ones(part).sum() for part in words.split(_WORDS_AT_ONCE)))


def spare_bits(bits: Tensor, num_blocks: int) -> int:
    """Returns the bits after that of the last block, as a number: 0 in every valid topology."""
    return int(bits[-1]) >> num_blocks % 8 if num_blocks % 8 else 0


def digest_bits(bits: Tensor) -> tuple[int, int]:
    """Returns the number of active blocks and a 64-bit fingerprint of ``bits``, the same on every device.

    Reads each bit once, in pieces of a few megabytes; waits for the device.
    """
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(torch.int64)
    totals = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for first in range(0, padded.numel(), _WORDS_AT_ONCE):
        words = padded[first : first + _WORDS_AT_ONCE]
        totals[0] += _ones(words).sum()
        number = torch.arange(first + 1, first + 1 + words.numel(), device=bits.device)
        mixed = (words ^ number * _MIX) * _MIX
        totals[1] += ((mixed ^ mixed >> 29) * _MIX).sum()
    count, fingerprint = totals.tolist()
    return count, fingerprint


def _ones(words: Tensor) -> Tensor:
    """Returns the number of set bits of each int64, added up in ever wider fields (Warren, Hacker's Delight, 5-1)."""
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    words = words + (words >> 4) & 0x0F0F0F0F0F0F0F0F
    return words * 0x0101010101010101 >> 56 & 0xFF


def positions_of(mask: Tensor, count: int | None = None) -> Tensor:
    """Returns the positions (N,) int64 of the active blocks, row-major. Given their ``count`` it waits for no GPU."""
    if type(mask) is Tensor and not _is_asynchronous(mask.device):
        return torch.from_numpy(mask.numpy().ravel().nonzero()[0])  # takes a seventh of the time of ``mask.nonzero()``
    if count is None or not _is_asynchronous(mask.device):
        return mask.nonzero().squeeze(1)
    return torch.nonzero_static(mask, size=count).squeeze(1)


def _is_asynchronous(device: torch.device) -> bool:
    return device.type != "cpu"


_Constant = TypeVar("_Constant")


class _Lists(NamedTuple):
    positions: Tensor | None
    by_column: Tensor | None
    rows_by_column: Tensor | None
    row_starts: Tensor | None
    column_starts: Tensor | None
    group_starts: Tensor | None


class Topology:
    """Holds the active blocks of one weight. It is immutable: a new one is made after every change.

    Args:
        layout: how the weight is cut into blocks.
        bits: (ceil(num_blocks / 8),) uint8, one bit per block, from which everything else follows.
        lists: one int32 or int64 tensor that holds, one after another, the lists below that this kind of block has.
        num_active: N, the number of active blocks.

    Attributes (a list that this kind of block does not have is None):
        positions: (N,) of the active blocks, row-major; for tiles and runs.
        by_column: (N,) rows of ``values`` in order of (matrix, block column, block row); for tiles.
        rows_by_column: (N,) block row, within its matrix, of each block in the order of ``by_column``; for tiles.
        row_starts: (S M + 1,); ``values[row_starts[r] : row_starts[r + 1]]`` are the blocks of block row r, counted
            through all matrices; for tiles.
        column_starts: (S K + 1,), the same for ``by_column``; for tiles.
        group_starts: (G + 1,) active blocks before each group of ``layout.blocks_per_group`` positions; for single
            weights and runs.
        values_shape: (N,) or (N, bm, bn). num_matrices: S.
    """

    def __init__(self, layout: Layout, bits: Tensor, lists: Tensor, num_active: int) -> None:
        self.layout = layout
        self.bits = bits
        self.lists = lists
        self.num_active = num_active
        found = _split(lists, layout, num_active)
        self.positions, self.by_column, self.rows_by_column = found.positions, found.by_column, found.rows_by_column
        self.row_starts, self.column_starts, self.group_starts = (
            found.row_starts,
            found.column_starts,
            found.group_starts,
        )
        self.values_shape = layout.values_shape(num_active)
        self.num_matrices = layout.num_matrices
        self._constants: dict[Hashable, Any] = {}
        self._states = self._read_states()

    @classmethod
    def from_bits(cls, bits: Tensor, layout: Layout, num_active: int | None = None) -> Topology:
        """Derives the lists from the bits; counts the active blocks where ``num_active`` is None."""
        num_active = count_active(bits) if num_active is None else num_active
        lists = empty_lists(layout, num_active, bits.device)
        write_lists(lists, bits, layout)
        return cls(layout, bits, lists, num_active)

    @classmethod
    def from_mask(cls, mask: Tensor, layout: Layout) -> Topology:
        """Makes the topology of a mask (num_blocks,) bool."""
        return cls.from_bits(pack_bits(mask), layout)

    @property
    def density(self) -> float:
        return self.num_active / self.layout.num_blocks

    def mask(self) -> Tensor:
        """Returns the mask (num_blocks,) bool of the active blocks, row-major."""
        return unpack_bits(self.bits, self.layout.num_blocks)

    def active_blocks(self) -> Tensor:
        """Returns the positions (N,) int64 of the active blocks where they are listed, else their mask."""
        return self.mask() if self.positions is None else self.positions.long()

    def of_rows(self, rows: slice) -> Topology:
        """Returns the topology of some rows of the values alone, as if the weight had no other active block."""
        if (rows.start, rows.stop) == (0, self.num_active):
            return self
        return self.constant(("rows", rows.start, rows.stop), lambda: self._make_of_rows(rows))

    def _make_of_rows(self, rows: slice) -> Topology:
        positions = positions_of(self.mask()) if self.positions is None else self.positions.long()
        mask = torch.zeros(self.layout.num_blocks, dtype=torch.bool, device=self.bits.device)
        mask[positions[rows]] = True
        return Topology.from_bits(pack_bits(mask), self.layout, rows.stop - rows.start)

    def is_unchanged(self) -> bool:
        """Tells whether neither bits nor lists were written, moved or replaced since this object was made."""
        return self._states == self._read_states()

    def constant(self, key: Hashable, make: Callable[[], _Constant]) -> _Constant:
        """Returns what ``make`` made at the first call for ``key``, such as the constant arguments of a launch."""
        found = self._constants.get(key)
        if found is None:
            found = self._constants[key] = make()
        constant: _Constant = found
        return constant

    def _read_states(self) -> tuple[int, int, int, int]:
        """Returns versions and addresses, one of which changes with every write and wherever ``tensor.data`` is set."""
        bits, lists = self.bits, self.lists
        has_addresses = type(bits) is Tensor and type(lists) is Tensor  # a fake tensor warns where it is asked for one
        try:
            if has_addresses:
                return bits._version, bits.data_ptr(), lists._version, lists.data_ptr()
            return bits._version, id(bits), lists._version, id(lists)
        except RuntimeError:  # inference tensors have no version
            return -1, _address(bits), -1, _address(lists)


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if type(tensor) is Tensor else id(tensor)


def _lengths(layout: Layout, num_active: int) -> tuple[int | None, ...]:
    """Returns the length of each list of ``_Lists``, in its order; None where this kind of block does not have it."""
    if layout.tiles:
        stacked = layout.num_matrices
        return *(num_active,) * 3, stacked * layout.block_rows + 1, stacked * layout.block_cols + 1, None
    return None if layout.single_weights else num_active, None, None, None, None, layout.num_groups + 1


def _split(lists: Tensor, layout: Layout, num_active: int) -> _Lists:
    """Returns the lists as views of the one tensor; all None where it has another length than they have together."""
    lengths = _lengths(layout, num_active)
    whole = [length or 0 for length in lengths]
    if lists.numel() != sum(whole):
        return _Lists(*(None,) * len(lengths))
    parts = zip(lists.split(whole), lengths, strict=True)
    return _Lists(*(None if length is None else part for part, length in parts))


def empty_lists(layout: Layout, num_active: int, device: torch.device) -> Tensor:
    """Returns an uninitialised tensor for the lists."""
    dtype = torch.int32 if layout.num_blocks < 2**31 else torch.int64
    return torch.empty(sum(length or 0 for length in _lengths(layout, num_active)), dtype=dtype, device=device)


def write_lists(lists: Tensor, bits: Tensor, layout: Layout) -> None:
    """Fills ``lists`` with the lists that follow from ``bits``."""
    mask = unpack_bits(bits, layout.num_blocks)
    if layout.tiles:
        _write_tiles(lists, mask, layout)
        return
    over = -layout.num_blocks % layout.blocks_per_group
    in_group = torch.nn.functional.pad(mask, (0, over)).view(-1, layout.blocks_per_group).sum(1, dtype=torch.int32)
    group_starts = lists[-(in_group.numel() + 1) :]
    group_starts[0] = 0
    torch.cumsum(in_group, 0, out=group_starts[1:])
    if not layout.single_weights:
        lists[: -group_starts.numel()] = positions_of(mask)


def _write_tiles(lists: Tensor, mask: Tensor, layout: Layout) -> None:
    positions = positions_of(mask)
    row, col = positions // layout.block_cols, positions % layout.block_cols
    column = row // layout.block_rows * layout.block_cols + col
    by_column = column.argsort(stable=True)
    to = _split(lists, layout, positions.numel())
    for target, source in (
        (to.positions, positions),
        (to.by_column, by_column),
        (to.rows_by_column, (row % layout.block_rows).index_select(0, by_column)),
        (to.row_starts, _starts(row, layout.num_matrices * layout.block_rows)),
        (to.column_starts, _starts(column, layout.num_matrices * layout.block_cols)),
    ):
        assert target is not None
        target.copy_(source)


def _starts(line_N: Tensor, num_lines: int) -> Tensor:
    counts = torch.bincount(line_N, minlength=num_lines)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))

"""Cuts a weight into slabs of rows or of columns, each with a budget of active blocks and a seed of its own.

Tensor parallelism gives each rank some slabs of a weight. Where the weight is whole, its slabs share out the active
blocks in the same way. So a weight with four slabs is one model, whether one, two or four ranks hold it.

Flat tensors with an entry for each block are row-major. Shape suffix: N active blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from smet_compile.format import patterns
from smet_compile.format.arguments import described
from smet_compile.format.layout import Layout, Slabs


@dataclass(frozen=True)
class Band:
    """Describes some consecutive rows of blocks of a weight, or some consecutive columns of them.

    Args:
        whole: the layout of the weight. layout: that of the band on its own.
        dim: 0 for rows, 1 for columns. number: how many bands of this size come before it.
        key: the number of the slab in the weight that all ranks have together; None where the band is all there is.
    """

    whole: Layout
    layout: Layout
    dim: int = 0
    number: int = 0
    key: int | None = None

    def cut(self, blocks: Tensor) -> Tensor:
        """Returns the entries of this band, flat, of ``blocks`` (num_blocks,)."""
        return blocks if self.is_all else self._view(blocks).reshape(-1)

    def paste_(self, blocks: Tensor, here: Tensor) -> None:
        """Writes the entries of this band into ``blocks`` (num_blocks,)."""
        view = self._view(blocks)
        view.copy_(here.view(view.shape))

    def place(self, positions: Tensor) -> Tensor:
        """Returns where blocks of this band lie in the whole weight."""
        if self.is_all:
            return positions
        row, col = positions // self.layout.block_cols, positions % self.layout.block_cols
        first_row, first_col = self._first
        return (row + first_row) * self.whole.block_cols + col + first_col

    def within(self, positions: Tensor) -> Tensor:
        """Returns where blocks of the whole weight, which lie in this band, lie in it."""
        if self.is_all:
            return positions
        row, col = positions // self.whole.block_cols, positions % self.whole.block_cols
        first_row, first_col = self._first
        return (row - first_row) * self.layout.block_cols + col - first_col

    def cut_dense(self, dense: Tensor) -> Tensor:
        """Returns the part of a dense weight, contiguous."""
        if self.is_all:
            return dense
        size = self.layout.shape[self.dim]
        return dense.narrow(self.dim, self.number * size, size).contiguous()

    def of_active(self, rows_N: Tensor, mask: Tensor) -> Tensor:
        """Returns the rows of this band of rows (N,) that belong to the active blocks of ``mask`` (num_blocks,)."""
        if self.is_all:
            return rows_N
        everywhere = rows_N.new_zeros(mask.shape)
        everywhere[mask] = rows_N
        return self.cut(everywhere)[self.cut(mask)]

    @property
    def is_all(self) -> bool:
        return self.layout.matrix == self.whole.matrix

    @property
    def _first(self) -> tuple[int, int]:
        """Returns the first row and column of blocks."""
        if self.dim == 0:
            return self.number * self.layout.block_rows, 0
        return 0, self.number * self.layout.block_cols

    def _view(self, blocks: Tensor) -> Tensor:
        size = self.layout.block_rows if self.dim == 0 else self.layout.block_cols
        matrix = blocks.view(self.whole.num_matrices * self.whole.block_rows, self.whole.block_cols)
        return matrix if self.is_all else matrix.narrow(self.dim, self.number * size, size)


def bands_of(layout: Layout) -> list[Band]:
    """Returns the slabs of a weight; all of it as one band where it has none."""
    if layout.slabs is None:
        return [Band(layout, layout)]
    count, dim, first = layout.slabs
    one = layout.cut(dim, count)
    return [Band(layout, one, dim, number, first + number) for number in range(count)]


def mask_error(mask: Tensor, pattern: str | None, layout: Layout) -> str | None:
    """Says how the active blocks break the pattern in a slab, or the budgets of slabs; None where they keep to them."""
    bands = bands_of(layout)
    if pattern is None and len(bands) == 1:
        return None
    masks = [band.cut(mask) for band in bands]
    counts = {int(each.sum()) for each in masks} if len(bands) > 1 else {0}
    if len(counts) > 1:
        return f"expected as many active blocks in each of {len(bands)} slabs, got {min(counts)} to {max(counts)}"
    errors = (patterns.mask_error(each, pattern, band.layout) for each, band in zip(masks, bands, strict=True))
    return next((error for error in errors if error is not None), None)


def check_mask(name: str, mask: Tensor, pattern: str | None, layout: Layout) -> None:
    """Raises ValueError, which begins with ``name``, where the active blocks do not keep to pattern and slabs."""
    for band in bands_of(layout):
        patterns.check_mask(name, band.cut(mask), pattern, band.layout)
    if error := mask_error(mask, pattern, layout):
        raise ValueError(f"{name}: {error}; pass a mask that keeps to the slabs, or leave them out")


def check_slabs(name: str, slabs: object) -> Slabs:
    """Returns the slabs that ``slabs``, a pair (count, dim), asks for. Raises ValueError for anything else."""
    pair = tuple(slabs) if isinstance(slabs, Iterable) and not isinstance(slabs, str) else ()
    if len(pair) != 2 or not all(type(number) is int for number in pair) or pair[0] < 1 or pair[1] not in (0, 1):
        raise ValueError(
            f"{name}: expected slabs (count, dim) with dim 0 for rows and 1 for columns, got {described(slabs)}; pass "
            "for example (4, 1)"
        )
    return Slabs(*pair)


def check_divides(name: str, layout: Layout, slabs: Slabs) -> None:
    """Raises ValueError where a weight cannot be cut into these slabs along the borders of its blocks."""
    what, size, block = ("rows", "columns")[slabs.dim], layout.matrix[slabs.dim], layout.block_shape[slabs.dim]
    if len(layout.shape) != 2 or layout.matrix != layout.shape:
        raise ValueError(f"{name}: expected one matrix to cut into slabs, got shape {layout.shape}; leave it out")
    if size % (slabs.num * block):
        raise ValueError(
            f"{name}: expected {what} that {slabs.num} slabs of whole blocks of {block} divide, got {size}; take "
            "other slabs or smaller blocks, or leave the weight dense"
        )

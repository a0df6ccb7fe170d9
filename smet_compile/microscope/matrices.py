"""A matrix as what passes through it: which columns reach which rows, in time linear in its active blocks.

Shape suffixes: N active blocks, S stacked matrices (R, C) of M block rows and K block columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from smet_compile.format import Layout, positions_of, unpack_bits

_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class ActiveMatrix:
    """A stack of matrices of which some blocks are active; ``positions_N`` None: all of them.

    Entries of vectors number rows, or columns, through all matrices of the stack.
    """

    layout: Layout
    positions_N: Tensor | None = field(default=None)

    @classmethod
    def of(cls, topology: Tensor, layout: Layout) -> ActiveMatrix:
        """From the packed bits."""
        return cls(layout, positions_of(unpack_bits(topology.cpu(), layout.num_blocks)))

    @property
    def num_rows(self) -> int:
        return self.layout.num_matrices * self.layout.rows

    @property
    def num_cols(self) -> int:
        return self.layout.num_matrices * self.layout.cols

    @property
    def num_active_weights(self) -> int:
        """Inside of active blocks; a block that hangs over an edge has fewer."""
        return self.count((torch.ones(self.num_rows), torch.ones(self.num_cols)))

    @cached_property
    def block_row_N(self) -> Tensor:
        """Block row of each active block, through all matrices of the stack."""
        assert self.positions_N is not None
        return self.positions_N // self.layout.block_cols

    @cached_property
    def block_col_N(self) -> Tensor:
        """Block column of each active block, likewise."""
        assert self.positions_N is not None
        matrix_N = self.positions_N // (self.layout.block_rows * self.layout.block_cols)
        return matrix_N * self.layout.block_cols + self.positions_N % self.layout.block_cols

    def to_rows(self, of_cols: Tensor) -> Tensor:
        """The sum over each row's active weights of what stands at their columns."""
        lay = self.layout
        if self.positions_N is None:
            return of_cols.view(lay.num_matrices, lay.cols).sum(1).repeat_interleave(lay.rows)
        blocks = self._per_block(of_cols, lay.cols, lay.block_shape[1])
        rows = blocks.new_zeros(lay.num_matrices * lay.block_rows)
        rows.index_add_(0, self.block_row_N, blocks[self.block_col_N])
        return self._per_entry(rows, lay.rows, lay.block_shape[0])

    def to_cols(self, of_rows: Tensor) -> Tensor:
        """The sum over each column's active weights of what stands at their rows."""
        lay = self.layout
        if self.positions_N is None:
            return of_rows.view(lay.num_matrices, lay.rows).sum(1).repeat_interleave(lay.cols)
        blocks = self._per_block(of_rows, lay.rows, lay.block_shape[0])
        cols = blocks.new_zeros(lay.num_matrices * lay.block_cols)
        cols.index_add_(0, self.block_col_N, blocks[self.block_row_N])
        return self._per_entry(cols, lay.cols, lay.block_shape[1])

    def count(self, *where: tuple[Tensor, Tensor]) -> int:
        """Active weights in one of the rows and one of the columns of any pair of masks (rows, columns)."""
        if len(where) == 1:
            rows, cols = where[0]
            return int((self.to_rows(cols.double()) * rows).sum())
        assert self.positions_N is not None
        bm, bn = self.layout.block_shape
        step = max(1, _WEIGHTS_AT_ONCE // (bm * bn))
        sides = [
            (self._blocks(rows, self.layout.rows, bm), self._blocks(cols, self.layout.cols, bn)) for rows, cols in where
        ]
        total = 0
        for first in range(0, self.positions_N.numel(), step):
            row, col = self.block_row_N[first : first + step], self.block_col_N[first : first + step]
            inside = [rows[row].unsqueeze(2) & cols[col].unsqueeze(1) for rows, cols in sides]
            total += int(torch.stack(inside).any(0).sum())
        return total

    def _blocks(self, entries: Tensor, length: int, block: int) -> Tensor:
        """The ``length`` entries of each matrix, cut into blocks: (blocks, block)."""
        return torch.nn.functional.pad(entries.view(-1, length), (0, -length % block)).view(-1, block)

    def _per_block(self, entries: Tensor, length: int, block: int) -> Tensor:
        """Sums over the ``length`` entries of each matrix, cut into blocks."""
        return self._blocks(entries, length, block).sum(1)

    def _per_entry(self, blocks: Tensor, length: int, block: int) -> Tensor:
        """What stands at each block, at each of its entries that is inside the matrix."""
        wide = blocks.view(self.layout.num_matrices, -1).repeat_interleave(block, dim=1)
        return wide[:, :length].reshape(-1)

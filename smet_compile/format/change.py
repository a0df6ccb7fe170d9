"""Describes a topology change of one weight, for whoever stores something per block: which rows stay, and where."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smet_compile.format.part import Part
from smet_compile.format.topology import positions_of
from smet_compile.shards import Rows, local


@dataclass(frozen=True)
class TopologyChange:
    """Describes what a topology change did to one weight, for whoever stores something per block.

    An update keeps the number of active blocks; a density stage takes it from N to N'.

    Args:
        values: the compact parameter, which holds the new values already.
        survives: (N,) bool over the old rows: the block is still active.
        survived: (N',) bool over the new rows: the block was active before; False for a newly grown one.
        rows: which of the rows each rank holds.
        was_active: (num_blocks,) bool, the blocks that were active before.
        part: where the weight lies in one that tensor parallelism has cut; None where it is whole.
    """

    values: torch.nn.Parameter
    survives: Tensor
    survived: Tensor
    rows: Rows
    was_active: Tensor
    part: Part | None = None

    @classmethod
    def between(
        cls, values: torch.nn.Parameter, before: Tensor, after: Tensor, part: Part | None = None
    ) -> TopologyChange:
        """Compares the masks (num_blocks,) before and after."""
        survives = after.index_select(0, positions_of(before))
        rows = Rows.of(values, None if part is None else part.mesh)
        return cls(values, survives, before.index_select(0, positions_of(after)), rows, before, part)

    @property
    def resizes(self) -> bool:
        """Tells whether the number of active blocks changes."""
        return self.survives.numel() != self.survived.numel()

    @property
    def survived_here(self) -> Tensor:
        """Returns ``survived`` for the rows that this rank holds."""
        return self.survived if self.rows.are_whole else self.survived[self.rows.here]

    def has_old_rows(self, rows: Any) -> bool:
        """Tells whether ``rows`` is a tensor of the shape that the values had before the change."""
        num_parts = 1 if self.part is None else self.part.count
        return isinstance(rows, Tensor) and rows.shape == (num_parts * self.survives.numel(), *self.values.shape[1:])

    @property
    def old_places_here(self) -> Tensor:
        """Returns where the blocks of this rank's rows before the change lie in the whole weight."""
        positions = positions_of(self.was_active)[self.rows.here]
        return positions if self.part is None else self.part.band.place(positions)

    def moved(self, rows: Tensor) -> Tensor:
        """Returns new rows (N', ...) from ``rows`` (N, ...): survivors bit for bit, newcomers zero."""
        old_rows, new_rows = self._kept_rows
        kept = rows.index_select(0, old_rows)
        if new_rows.numel() == self.survived.numel():
            return kept
        return rows.new_zeros(self.survived.numel(), *rows.shape[1:]).index_copy_(0, new_rows, kept)

    def remap_(self, rows: Tensor) -> Tensor:
        """Moves ``rows`` (N, ...) to the new order: survivors bit for bit, newcomers zero.

        It stays the same tensor object. Where the number of blocks changes, its memory is replaced, else written to.
        Rows that another rank holds next are sent to it.
        """
        if self.resizes:
            rows.data = self.moved(rows)
            return rows
        old_rows, new_rows = self._kept_rows
        here: Tensor = local(rows)
        kept = self.rows.exchange(here.index_select(0, self.rows.among(old_rows)), old_rows, new_rows)
        here.zero_().index_copy_(0, self.rows.among(new_rows), kept)
        return rows

    @functools.cached_property
    def _kept_rows(self) -> tuple[Tensor, Tensor]:
        """Finds the old and the new rows of the survivors, once for all that is stored per block."""
        return positions_of(self.survives), positions_of(self.survived)

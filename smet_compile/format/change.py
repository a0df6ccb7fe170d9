"""TopologyChange: one site's move to another active set, as a value handed to whoever stores something per block."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from smet_compile.format.topology import positions_of


@dataclass(frozen=True)
class TopologyChange:
    """What a topology update did to one weight. The number of active blocks N stays.

    Args:
        values: the compact parameter, already holding the new values.
        survives: (N,) bool over the rows before: the block is still active.
        survived: (N,) bool over the rows after: the block was active before. False: newly grown.
    """

    values: torch.nn.Parameter
    survives: Tensor
    survived: Tensor

    @classmethod
    def between(cls, values: torch.nn.Parameter, before: Tensor, after: Tensor) -> TopologyChange:
        """From the masks (num_blocks,) before and after."""
        survives = after.index_select(0, positions_of(before))
        return cls(values, survives, before.index_select(0, positions_of(after)))

    def remap_(self, rows: Tensor) -> Tensor:
        """Moves ``rows`` (N, ...) to the new order in place: survivors bit for bit, newcomers zero."""
        old_rows, new_rows = self._kept_rows
        kept = rows.index_select(0, old_rows)
        return rows.zero_().index_copy_(0, new_rows, kept)

    @functools.cached_property
    def _kept_rows(self) -> tuple[Tensor, Tensor]:
        """The rows of the survivors, before and after: looked for once, for all that is stored per block."""
        return positions_of(self.survives), positions_of(self.survived)

"""Counts of the updates that backward makes: what is left to look at where no gradient outlives its update."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

_COUNTS = "_smet_update_counts"


@dataclass(frozen=True, eq=False)
class UpdateCounts:
    """Of one parameter; int64 scalars.

    Args:
        num_updates, num_skipped: how many updates there were, and how many blocks they skipped for a gradient that
            is not finite. Backward raises them in place.
        first_updates, first_skipped: what they were before the first step that was counted by them.
    """

    num_updates: Tensor
    num_skipped: Tensor
    first_updates: Tensor
    first_skipped: Tensor

    def now(self) -> tuple[int, int]:
        """Waits for the device."""
        return int(self.num_updates), int(self.num_skipped)

    def at_first(self) -> tuple[int, int]:
        return int(self.first_updates), int(self.first_skipped)


def counts_of(optimizer: Optimizer) -> dict[nn.Parameter, UpdateCounts]:
    """Of every parameter whose update was made in backward. Neither saved nor copied with the optimizer."""
    counts: dict[nn.Parameter, UpdateCounts] = optimizer.__dict__.setdefault(_COUNTS, {})
    return counts


def count_by(optimizer: Optimizer, parameter: nn.Parameter, num_updates: Tensor, num_skipped: Tensor) -> None:
    """Says by which tensors the updates of ``parameter`` are counted. Others than before (a state was loaded) start
    afresh."""
    known = counts_of(optimizer).get(parameter)
    if known is None or known.num_updates is not num_updates or known.num_skipped is not num_skipped:
        first = num_updates.clone(), num_skipped.clone()
        counts_of(optimizer)[parameter] = UpdateCounts(num_updates, num_skipped, *first)

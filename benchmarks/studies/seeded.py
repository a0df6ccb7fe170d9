"""Gives grown blocks the others' second moment instead of zero, as an alternative to measure against."""

from __future__ import annotations

import torch

import smet_compile as smet
from smet_compile.format import TopologyChange


class SeededAdamW(smet.NaiveAdamW):
    """Corrects bias by the step count, as is right for moments that look old; m starts at 0, v at the mean v."""

    @torch.no_grad()
    def on_topology_change(self, change: TopologyChange) -> None:
        super().on_topology_change(change)
        state = self.state.get(change.values)
        if state and not change.survived.all():
            second = state["exp_avg_sq"]
            second[~change.survived] = second[change.survived].mean()

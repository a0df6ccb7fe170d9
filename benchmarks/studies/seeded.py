"""An alternative to zeroed moments, to measure against: grown blocks take over the others' second moment."""

from __future__ import annotations

import torch

import smet_compile as smet
from smet_compile.format import TopologyChange


class SeededAdamW(smet.NaiveAdamW):
    """Bias corrections by the step count, as is right for moments that look old; m starts at 0, v at the mean v."""

    @torch.no_grad()
    def on_topology_change(self, change: TopologyChange) -> None:
        super().on_topology_change(change)
        state = self.state.get(change.values)
        if state and not change.survived.all():
            second = state["exp_avg_sq"]
            second[~change.survived] = second[change.survived].mean()

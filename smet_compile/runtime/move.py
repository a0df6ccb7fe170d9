"""Moves one weight to another active set: values, gradient, topology and optimizer state, all in place."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from smet_compile.format import TopologyChange
from smet_compile.ops import Site
from smet_compile.runtime.events import SiteEvent
from smet_compile.runtime.optimizer_state import follow
from smet_compile.runtime.trace import Trace


def move(site: Site, before: Tensor, dropped: Tensor, grown: Tensor, optimizer: Optimizer, trace: Trace) -> SiteEvent:
    """Drops and grows the blocks at the given positions, as many of each; ``before`` is the mask of active ones."""
    ages = optimizer.block_ages(site.values) if hasattr(optimizer, "block_ages") else None
    after = before.clone()
    after[dropped] = False
    after[grown] = True
    change = TopologyChange.between(site.values, before, after)
    change.remap_(site.values)
    if site.values.grad is not None:
        change.remap_(site.values.grad)
    site.compact.set_mask(after)
    follow(optimizer, site, change)
    survival, explored = trace.record(site.name, after, after & ~before)
    return SiteEvent(
        num_active=site.num_active,
        num_dropped=dropped.numel(),
        churn_fraction=dropped.numel() / site.num_active,
        grown_survival_fraction=survival,
        mean_age=None if ages is None else float(ages.double().mean()),
        explored_fraction=explored,
    )

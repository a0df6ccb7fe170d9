"""Moves one weight to another active set: values, gradient, topology and optimizer state, all in place."""

from __future__ import annotations

from torch import Tensor

from smet_compile.format import TopologyChange
from smet_compile.ops import Site
from smet_compile.runtime.events import SiteEvent
from smet_compile.runtime.optimizer_state import StateToMove
from smet_compile.runtime.trace import Trace


def move(
    site: Site,
    before: Tensor,
    dropped: Tensor,
    grown: Tensor,
    state: StateToMove,
    ages: Tensor | None,
    trace: Trace,
) -> SiteEvent:
    """Drops and grows the blocks at the given positions, as many of each.

    Args:
        before: the mask of active blocks. state: what else follows. ages: of the active blocks, where they are known.
    """
    after = before.clone()
    after[dropped] = False
    after[grown] = True
    change = TopologyChange.between(site.values, before, after)
    change.remap_(site.values)
    if site.values.grad is not None:
        change.remap_(site.values.grad)
    site.compact.set_mask(after)
    state.follow(site, change)
    survival, explored = trace.record(site.name, after, after & ~before)
    return SiteEvent(
        num_active=site.num_active,
        num_dropped=dropped.numel(),
        churn_fraction=dropped.numel() / site.num_active,
        grown_survival_fraction=survival,
        mean_age=None if ages is None else float(ages.double().mean()),
        explored_fraction=explored,
    )

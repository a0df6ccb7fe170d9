"""Makes flat numbers of what a topology manager and its optimizer know, for whoever logs them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from smet_compile.ops import Site
from smet_compile.runtime.history import FRACTIONS, TopologyEvent
from smet_compile.runtime.optimizer_steps import read_scalars


def flat_metrics(
    sites: Mapping[str, Site], history: list[TopologyEvent], num_steps: int, optimizers: Iterable[Any]
) -> dict[str, float]:
    """Returns what ``TopologyManager.metrics`` does; it waits for each device once."""
    sizes = {name: math.prod(site.layout.shape) for name, site in sites.items()}
    found = {
        "density": sum(site.density * sizes[name] for name, site in sites.items()) / sum(sizes.values()),
        "steps": float(num_steps),
        "updates": float(len(history)),
    }
    skipped = [state["num_skipped"] for each in optimizers for state in each.state.values() if "num_skipped" in state]
    if skipped:
        found["skipped_blocks"] = float(sum(read_scalars(skipped)))
    if history:
        total = history[-1].total
        shares = {name: getattr(total, name) for name in (*FRACTIONS, "mean_age")}
        found |= {name: float(value) for name, value in shares.items() if value is not None}
    return found

"""Makes flat numbers of what a topology manager and its optimizer know, for whoever logs them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from smet_compile.ops import Site
from smet_compile.runtime.history import FRACTIONS, TopologyEvent
from smet_compile.runtime.optimizer_steps import read_scalars
from smet_compile.shards import local

LOGGED = "smet/"
"""The prefix of all names of numbers in the logs of trainers."""


def flat_metrics(
    sites: Mapping[str, Site], history: list[TopologyEvent], num_steps: int, optimizers: Iterable[Any]
) -> dict[str, float]:
    """Returns what ``TopologyManager.metrics`` does; it waits for each device once."""
    sizes = {name: math.prod(site.layout.shape) for name, site in sites.items()}
    found = {
        "density": sum(site.density * sizes[name] for name, site in sites.items()) / sum(sizes.values())
        if sites
        else 1.0,
        "steps": float(num_steps),
        "updates": float(len(history)),
    }
    optimizers = list(optimizers)
    found["compact_bytes"] = float(sum(_bytes_of(site, optimizers) for site in sites.values()))
    skipped = [state["num_skipped"] for each in optimizers for state in each.state.values() if "num_skipped" in state]
    if skipped:
        found["skipped_blocks"] = float(sum(read_scalars(skipped)))
    if history:
        total = history[-1].total
        shares = {name: getattr(total, name) for name in (*FRACTIONS, "mean_age")}
        found |= {name: float(value) for name, value in shares.items() if value is not None}
    return found


def _bytes_of(site: Site, optimizers: list[Any]) -> int:
    """Returns the bytes of values, topology and optimizer state of one weight on this rank, shared memory once."""
    states = (each.state[site.values] for each in optimizers if site.values in each.state)
    tensors = [site.values, site.compact.topology, *(tensor for state in states for tensor in state.values())]
    here = [local(tensor).detach() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in here}.values())

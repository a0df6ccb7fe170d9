"""Reads what optimizers keep for the blocks of compact weights."""

from typing import Any

import torch
from torch import Tensor

from smet_compile.ops import find_sites


def kept(run: Any) -> dict[str, dict[str, Tensor]]:
    """Returns what is kept for each block of each weight by its place in the weight; NaN where none is active."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, site in find_sites(run[0]).items():
        values, optimizer, found[name] = site.values, run[1], {}
        if hasattr(optimizer, "read_slot"):
            rows = {key: optimizer.read_slot(values, key) for key in ("exp_avg", "exp_avg_sq")}
            rows["age"] = optimizer.block_ages(values)
        else:
            states = optimizer.state[values]
            inner = optimizer.base.state[values] if hasattr(optimizer, "base") else states
            rows = {key: inner[key] for key in ("exp_avg", "exp_avg_sq")}
            rows |= {"slow": states["slow"]} if "slow" in states else {}
        for key, each in rows.items():
            dense = torch.full((site.layout.num_blocks, *each.shape[1:]), torch.nan, dtype=torch.float64)
            dense[site.mask()] = each.double()
            found[name][key] = dense
    return found
